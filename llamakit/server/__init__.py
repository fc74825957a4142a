"""A model behind the HTTP APIs of OpenAI, Ollama and llama-server (extra `serve`: starlette, uvicorn)."""
