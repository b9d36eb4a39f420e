"""Worker: parse a network and build its engine with TensorRT's Python API, 8.6 to 11, or TensorRT-RTX's.

What differs between versions is looked for (`hasattr`), never derived from the version. Which flags there are, and what
they are called, is taken from NVIDIA/TensorRT, python/src/infer/pyCore.cpp and pyGraph.cpp at v8.6.1, v10.0.1, v10.16
and v11.1.

Question: {"package", "plan" (as BuildPlan.to_json writes it), "engine", "layers", "timing_cache", "log" (files to
write), "build", "inspect" (booleans)}.
Answer: {"step": "import" | "parse" | "build" | "inspect" | "done", "error", "parser_errors": [{"index", "node",
"operator", "text"}], "version", "flags", "notes", "seconds"}.

Or, to see whether networks are taken: {"package", "networks": [{"model", "profiles"}], "build", "log"}.
Answer: {"step", "error", "version", "results": [{"step", "error", "parser_errors", "size", "seconds"}]}, one result for
each network that was begun.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any

MIB = 1 << 20


class Refusal(Exception):  # noqa: N818 - not a fault of this program
    """TensorRT does not take the network, or builds nothing of it."""


def make_logger(package: Any, path: str) -> Any:
    """A logger that keeps every message, in the form of TensorRT's own Python logger."""
    stream = open(path, "w", encoding="utf-8", errors="replace")  # noqa: PTH123, SIM115 - closed with the process

    class Log(package.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            package.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            letter = {"VERBOSE": "V", "INFO": "I", "WARNING": "W", "ERROR": "E"}.get(str(severity.name), "F")
            stream.write(f"[{time.strftime('%m/%d/%Y-%H:%M:%S')}] [TRT] [{letter}] {message}\n")
            stream.flush()
            if letter in "EF":
                self.errors.append(" ".join(str(message).split()))

    return Log()


def member(kind: Any, name: str) -> Any:
    """A member of an enumeration of the package, or None."""
    return getattr(kind, name, None) if kind is not None else None


def make_network(package: Any, builder: Any) -> tuple[Any, list[str]]:
    """A network that follows the file's types where this build can."""
    bits, flags = 0, []
    # EXPLICIT_BATCH is needed by 8.6, ignored by 10, gone in 11; STRONGLY_TYPED is not in 8.6, and implied by 11.
    for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED"):
        flag = member(getattr(package, "NetworkDefinitionCreationFlag", None), name)
        if flag is not None:
            bits |= 1 << int(flag)
            flags.append(name)
    return builder.create_network(bits), flags


def parse(package: Any, network: Any, logger: Any, model: str) -> list[dict[str, Any]]:
    """Parse the network's file; what the parser objects to comes back."""
    parser = package.OnnxParser(network, logger)
    accepted = parser.parse_from_file(model)
    errors = [described(parser.get_error(index)) for index in range(parser.num_errors)]
    if not accepted and not errors:
        errors.append({"index": -1, "node": None, "operator": None, "text": "the parser does not say why"})
    return [] if accepted else errors


def described(error: Any) -> dict[str, Any]:
    """A parser's error; 8.6 gives the node's index only."""
    return {
        "index": int(error.node()),
        "node": (str(error.node_name()) if hasattr(error, "node_name") else "") or None,
        "operator": (str(error.node_operator()) if hasattr(error, "node_operator") else "") or None,
        "text": " ".join(str(error.desc()).split()),
    }


def configure(
    package: Any, builder: Any, network: Any, question: dict[str, Any], typed: bool
) -> tuple[Any, list[str], list[str]]:
    """The builder's configuration, the flags set in it, and what could not be set."""
    plan = question["plan"]
    config = builder.create_builder_config()
    floats = set(plan["precision"]["floats"])
    wanted = ["SPARSE_WEIGHTS"] if plan["sparsity"] else []
    if not typed:  # a strongly typed network refuses these
        wanted += ["FP16"] if "FLOAT16" in floats else []
        wanted += ["BF16"] if "BFLOAT16" in floats else []
        wanted += ["INT8"] if plan["precision"]["quantized"] else []
    flags, notes = [], []
    for name in wanted:
        flag = member(package.BuilderFlag, name)
        if flag is None:
            notes.append(f"this TensorRT has no builder flag {name}")
        else:
            config.set_flag(flag)
            flags.append(name)
    if hasattr(config, "profiling_verbosity"):
        config.profiling_verbosity = package.ProfilingVerbosity.DETAILED
    if plan["workspace"] is not None:
        config.set_memory_pool_limit(package.MemoryPoolType.WORKSPACE, plan["workspace"] * MIB)
    add_profiles(builder, network, config, plan["profiles"])
    if question["timing_cache"] is not None:
        notes += use_timing_cache(config, plan["timing_cache"])
    return config, flags, notes


def add_profiles(builder: Any, network: Any, config: Any, profiles: list[dict[str, Any]]) -> None:
    if not profiles:
        return
    for index in range(network.num_inputs):
        item = network.get_input(index)
        if item.is_shape_tensor and any(profile["name"] == item.name for profile in profiles):
            raise Refusal(
                f"the values of input {item.name!r} decide shapes in the network; make it a constant, since an engine"
                " is built for known sizes"
            )
    entry = builder.create_optimization_profile()
    for profile in profiles:
        entry.set_shape(
            *(profile["name"], *(tuple(profile[key]) for key in ("smallest", "usual", "largest")))
        )
    if config.add_optimization_profile(entry) == -1:
        raise Refusal("TensorRT refuses the optimisation profile; see the log")


def use_timing_cache(config: Any, path: str) -> list[str]:
    """Load the times of kernels of builds before; a cache of another device or version is left out."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            contents = file.read()
    except FileNotFoundError:
        contents = b""
    cache = config.create_timing_cache(contents) if contents else None
    if cache is not None and config.set_timing_cache(cache, False) is not False:
        return []
    cache = config.create_timing_cache(b"")
    config.set_timing_cache(cache, False)
    return ["the timing cache was made by another device or version, and is made anew"] if contents else []


def keep_timing_cache(config: Any, path: str) -> None:
    cache = config.get_timing_cache()
    if cache is not None:
        with open(path, "wb") as file:  # noqa: PTH123
            file.write(cache.serialize())


def inspect(package: Any, logger: Any, plan: Any, path: str) -> None:
    """The engine's layers; this needs the device."""
    engine = package.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        raise Refusal("the engine cannot be loaded here")
    text = engine.create_engine_inspector().get_engine_information(package.LayerInformationFormat.JSON)
    with open(path, "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write(str(text))


def work(question: dict[str, Any], say: Any) -> None:
    package = importlib.import_module(question["package"])
    start = time.monotonic()
    say(step="parse", version=str(getattr(package, "__version__", "")) or None)
    logger = make_logger(package, question["log"])
    if hasattr(package, "init_libnvinfer_plugins"):
        package.init_libnvinfer_plugins(logger, "")
    builder = package.Builder(logger)
    network, network_flags = make_network(package, builder)
    errors = parse(package, network, logger, question["plan"]["model"])
    if errors:
        say(parser_errors=errors)
        return
    typed = "STRONGLY_TYPED" in network_flags or not hasattr(package.BuilderFlag, "FP16")
    config, builder_flags, notes = configure(package, builder, network, question, typed)
    say(step="build", flags=[*network_flags, *builder_flags], notes=notes)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise Refusal("TensorRT builds nothing of it")
    with open(question["engine"], "wb") as file:  # noqa: PTH123
        file.write(serialized)
        file.flush()
        os.fsync(file.fileno())
    if question["timing_cache"] is not None:
        keep_timing_cache(config, question["timing_cache"])
    say(step="inspect", seconds=time.monotonic() - start)
    if question["inspect"]:
        inspect(package, logger, serialized, question["layers"])
    say(step="done")


def check_all(question: dict[str, Any], say: Any) -> None:
    """Parse each network, and build it; nothing is kept."""
    package = importlib.import_module(question["package"])
    logger = make_logger(package, question["log"])
    results: list[dict[str, Any]] = []
    say(step="parse", version=str(getattr(package, "__version__", "")) or None, results=results)
    builder = package.Builder(logger)
    for entry in question["networks"]:
        start = time.monotonic()
        result: dict[str, Any] = {"step": "parse", "error": None, "parser_errors": [], "size": 0}
        results.append(result)
        say()
        try:
            network, _ = make_network(package, builder)
            result["parser_errors"] = parse(package, network, logger, entry["model"])
            if not result["parser_errors"] and question["build"]:
                result["step"] = "build"
                say()
                config = builder.create_builder_config()
                add_profiles(builder, network, config, entry["profiles"])
                serialized = builder.build_serialized_network(network, config)
                if serialized is None:
                    raise Refusal("the compiler builds nothing of it")
                result["size"] = int(serialized.nbytes if hasattr(serialized, "nbytes") else len(serialized))
            if not result["parser_errors"]:
                result["step"] = "done"
        except Refusal as refusal:
            result["error"] = str(refusal)
        except Exception as error:
            result["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if result["error"] is not None and logger.errors:
            result["error"] += f" ({logger.errors[-1]})"
        logger.errors.clear()
        result["seconds"] = time.monotonic() - start
        say()
    say(step="done")


def main(question: str, answer: str) -> None:
    with open(question) as file:  # noqa: PTH123
        asked = json.load(file)
    facts: dict[str, Any] = {"step": "import", "error": None, "parser_errors": [], "flags": [], "notes": []}

    def say(**more: Any) -> None:
        facts.update(more)
        with open(f"{answer}.part", "w") as file:  # noqa: PTH123
            json.dump(facts, file)
        os.replace(f"{answer}.part", answer)  # noqa: PTH105

    say()
    try:
        (check_all if "networks" in asked else work)(asked, say)
    except Refusal as refusal:
        say(error=str(refusal))
    except BaseException as error:
        say(error=f"{type(error).__name__}: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    # Destructors of foreign libraries may crash or hang on the way out; the answer and the files are written.
    os._exit(0)
