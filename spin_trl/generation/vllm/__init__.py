"""An opponent played by a vLLM server: the HTTP API, the server's process, the client."""
