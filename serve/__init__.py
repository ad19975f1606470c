"""An HTTP server that puts the student in place of an LLM call.

serve.py: the program, its settings; app.py: the routes; request.py: reads a request's body and its text;
completions.py: chat completions and JSON Schemas; questions.py: typed questions; service.py: one decoder for
all requests, deferral to the LLM upstream, audits; bench.py: the speed.
"""
