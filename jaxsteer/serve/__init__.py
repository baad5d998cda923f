"""HTTP: a server that speaks the OpenAI API, with steering by request, and its page. Needs the extra ``serve``."""
