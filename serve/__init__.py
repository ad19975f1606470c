"""The student where the LLM call was: serve.py (program and routes), service.py (one decoder for all requests,
the LLM behind it), questions.py (requests in terms of the student's fields), bench.py."""
