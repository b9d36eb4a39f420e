"""Lower precision: which nodes of a float32 network may compute in float16 or bfloat16, and the network that does."""
