"""How an opponent's completions are made: one protocol, and its implementations.

`sampler` is the protocol; `vllm_sampler` speaks to a vLLM server through `vllm_api` (the only file that knows its HTTP
API), with `attempts` for how often, `publishing` for how an opponent gets there, and `answers` for what may come back;
`managed_server` runs such a server with the command of `serve_command`; `policy_sampler` generates in-process.
Nothing here knows of datasets or of the trainer.
"""
