"""How an opponent's completions are made: one protocol, and its implementations.

`sampler` is the protocol, `opening` chooses, opens and closes what fulfils it; `policy_sampler` generates in-process,
`vllm` asks vLLM servers. Nothing here knows of datasets or of the trainer.
"""
