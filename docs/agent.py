"""An agent's loop whose LLM is called only where the student is unsure. docs/router.md explains it.

    python serve/serve.py config/router.py --min_confidence=0.6 \
        --upstream=http://localhost:8080/v1 --upstream_model=qwen
    python docs/agent.py --limit=200

Asks about held-out questions of the extraction, and counts the calls of the LLM that were saved and the tools
that differ from the teacher's choice.
"""
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's root
# before the slow imports, see config/machine.py
from config import configure

from openai import OpenAI

from distil.records import open_shards

dataset = 'questions'  # word; data/<dataset>/<name>-* has the questions
name = 'router'        # word
limit = 200            # 1..; questions
base_url = 'http://127.0.0.1:8000/v1'  # text; of serve/serve.py
wrong = False          # also print the questions whose tool is not the teacher's
config = configure(globals())

# the agent's tools: what each is for
TOOLS = {
    'weather': 'rain, sun and heat', 'calendar': 'dates, plans and appointments',
    'music': 'songs, bands and instruments', 'movies': 'films and shows', 'recipes': 'food and cooking',
    'travel': 'places, trips and flights', 'search': 'facts about the world',
    'none': 'no tool: small talk about oneself',
}
tools = [{'type': 'function', 'function': {'name': tool, 'description': what, 'parameters': {
    'type': 'object', 'properties': {}}}} for tool, what in TOOLS.items()]


def choose_tool(client, question):
    """(name of the tool, who chose it: student, upstream, or student-unsure if upstream does not answer)."""
    reply = client.chat.completions.with_raw_response.create(
        model=name, messages=[{'role': 'user', 'content': question}], tools=tools, tool_choice='required')
    call, = reply.parse().choices[0].message.tool_calls
    return call.function.name, reply.headers['x-answered-by']


def read_questions():
    """[(question, the teacher's tool)] of held-out records."""
    shards = open_shards(dataset, name)
    space, rows = shards.open_space(), shards.split()[1]
    return [(space.tokenizer.decode(shards.ids(i).tolist()), space.to_json(shards.outs(i))['tool'])
            for i in rows[:limit]]


if __name__ == '__main__':
    client, counts, seconds = OpenAI(base_url=base_url, api_key='-'), Counter(), Counter()
    for question, expected in read_questions():
        start = time.perf_counter()
        tool, by = choose_tool(client, question)                # then the agent runs the tool
        seconds[by] += time.perf_counter() - start
        counts[by] += 1
        counts[f'{by} differs'] += tool != expected
        if wrong and tool != expected:
            print(f'{by}: {tool} (teacher: {expected})  {question}')
    for by in seconds:
        print(f'{by}: {counts[by]} questions, {counts[f"{by} differs"]} with another tool than the teacher\'s, '
              f'{seconds[by] / counts[by] * 1e3:.0f} ms each')
