"""vLLM as the stages see it: an HTTP client, the transfer of hidden states, and the speculative-decoding metrics.

Stages import `client` (which uses `pool`, `transfer` and `mooncake`) and `metrics`. vLLM itself loads `connector`,
inside its own processes, through the module path on its command line (`runner/servers/vllm.py`).
"""
