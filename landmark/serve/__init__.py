"""The server: OpenAI's protocol over the engine, for any model, and a page to try it on."""
