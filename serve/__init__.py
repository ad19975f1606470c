"""An HTTP server that puts the student in place of an LLM call.

serve.py: the program, its settings; app.py: the routes. What is asked: request.py: the body; prompts.py: the
text in a conversation, learn.py: its templates; forms.py, schemas.py, shapes.py: what the reply is made of.
Routes: completions.py, responses.py, questions.py, extraction.py, batches.py; replies.py. Who answers: students.py;
service.py: one decoder for all requests; upstream.py: deferral, audits; proxy.py: what no student can answer.
Around it: middleware.py, metrics.py; bench.py: the speed.
"""
