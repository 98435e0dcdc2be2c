"""The engine, vLLM, from the stages' side: requests to it, what hands hidden states over, what it counts.

Stages import `client` (through which `pool`, `transfer` and `mooncake` are used) and `metrics`. vLLM itself loads
`connector`, inside the server's process, by its name on the command line (`runner/servers/vllm.py`).
"""
