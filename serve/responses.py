"""POST /v1/responses: a request becomes a Plan, its Answer a body or events."""
import json
import time
import uuid

from serve.completions import count_tokens, logprobs_list, read_flag, read_number
from serve.forms import pick_form, read_tool_form, refuse_parameters
from serve.prompts import read_turns
from serve.request import Plan, require


def read_response(student, body):
    """the Plan of POST /v1/responses."""
    refuse_parameters(body, 'prompt')
    stream, top = read_flag(body, 'stream'), read_number(body, 'top_logprobs', 0, 20, 0)
    text = require(body.get('text') or {}, dict, 'an object', 'text', status=400)
    include = require(body.get('include') or [], list, 'a list', 'include', status=400)
    logprobs = 'message.output_text.logprobs' in include
    items = body.get('input')
    if isinstance(items, str):
        items = [{'role': 'user', 'content': items}]
    if instructions := body.get('instructions'):
        require(instructions, str, 'a string', 'instructions', status=400)
        items = [{'role': 'system', 'content': instructions},
                 *require(items, list, 'a string or a list', 'input', status=400)]
    turns = read_turns(items, 'input')
    for n, turn in enumerate(turns):
        turn.where = ('instructions',) if instructions and n == 0 else ('input', n - bool(instructions))
    form = pick_form(body, student, read_tool_form(body, student, is_response=True), turns,
                     text.get('format'),
                     'text', 'format')
    found, ignored, known = student.prompts.find_text(turns, 'input', form.forced)
    student.check_meant(body, known or not form.whole)

    def reply(answers):
        answer, = answers
        output = make_output(form, answer, student.space, top if logprobs else None)
        response = response_body(body, student.name, output, answer)
        return response_events(response, form.kind != 'text') if stream else response
    offered = form.shape.offered(student.space)
    return Plan([form.shape.with_options(found)], ('input',), reply, logprobs or bool(offered), offered, ignored,
                student.refuses_long(True))


def make_output(form, answer, space, top):
    """the output item: a message or the call of a function. top: see logprobs_list, None for no logprobs."""
    if form.kind == 'text':
        pieces = form.pieces(answer, space)
        content = {'type': 'output_text', 'text': ''.join(text for text, _, _ in pieces), 'annotations': [],
                   'logprobs': [] if top is None else logprobs_list(pieces, top)}
        return {'id': f'msg_{uuid.uuid4().hex}', 'type': 'message', 'status': 'completed',
                'role': 'assistant',
                'content': [content]}
    name, pieces = form.call(answer, space)
    return {'id': f'fc_{uuid.uuid4().hex}', 'type': 'function_call', 'status': 'completed', 'name': name,
            'call_id': f'call_{uuid.uuid4().hex[:24]}', 'arguments': ''.join(text for text, _, _ in pieces)}


def response_body(body, model, output, answer):
    """the body of a response: what the caller asked for, and the output."""
    n_in, n_out = count_tokens(answer)
    return {'id': f'resp_{uuid.uuid4().hex}', 'object': 'response', 'created_at': int(time.time()),
            'status': 'completed', 'completed_at': int(time.time()), 'error': None,
            'incomplete_details': None,
            'instructions': body.get('instructions'), 'max_output_tokens': body.get('max_output_tokens'),
            'model': model, 'output': [output], 'parallel_tool_calls': True, 'previous_response_id': None,
            'reasoning': {'effort': None, 'summary': None}, 'store': False, 'temperature': 0.0, 'top_p': 1.0,
            'text': body.get('text') or {'format': {'type': 'text'}}, 'truncation': 'disabled',
            'tool_choice': body.get('tool_choice') or 'auto', 'tools': body.get('tools') or [],
            'usage': {'input_tokens': n_in,
                      'input_tokens_details': {'cached_tokens': 0, 'cache_write_tokens': 0},
                      'output_tokens': n_out, 'output_tokens_details': {'reasoning_tokens': 0},
                      'total_tokens': n_in + n_out},
            'user': None, 'metadata': body.get('metadata') or {}}


def response_events(response, is_call):
    """the documented sequence of server-sent events for a complete response with one output item."""
    item, = response['output']
    begun = response | {'status': 'in_progress', 'completed_at': None, 'output': [], 'usage': None}
    at = {'item_id': item['id'], 'output_index': 0}
    events = [('response.created', {'response': begun}), ('response.in_progress', {'response': begun})]
    empty = {'arguments': ''} if is_call else {'content': []}
    events.append(('response.output_item.added', {'output_index': 0, 'item': item | {'status': 'in_progress'}
                                                  | empty}))
    if is_call:
        arguments, kind = item['arguments'], 'response.function_call_arguments'
        events += [(f'{kind}.delta', at | {'delta': arguments}),
                   (f'{kind}.done', at | {'name': item['name'], 'arguments': arguments})]
    else:
        part, = item['content']
        at_part = at | {'content_index': 0}
        tokens = [{key: token[key] for key in ('token', 'logprob')} | {'top_logprobs': [
            {key: other[key] for key in ('token', 'logprob')} for other in token['top_logprobs']]}
            for token in part['logprobs']]
        events += [('response.content_part.added', at_part | {'part': part | {'text': '', 'logprobs': []}}),
                   ('response.output_text.delta', at_part | {'delta': part['text'], 'logprobs': tokens}),
                   ('response.output_text.done', at_part | {'text': part['text'], 'logprobs': tokens}),
                   ('response.content_part.done', at_part | {'part': part})]
    events += [('response.output_item.done', {'output_index': 0, 'item': item}),
               ('response.completed', {'response': response})]
    return ''.join(f'event: {kind}\ndata: {json.dumps({"type": kind, "sequence_number": n} | data)}\n\n'
                   for n, (kind, data) in enumerate(events))
