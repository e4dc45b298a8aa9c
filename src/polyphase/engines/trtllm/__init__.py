"""A stock `trtllm-serve`, launched or attached to. Written from TensorRT-LLM's public sources and never run against the real engine,
which needs NVIDIA hardware: see docs/engines.md.
"""
