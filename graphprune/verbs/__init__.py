"""The command line's verbs, one a file: options in, exit code out."""
