# Requests to a voice assistant, labelled by people: one of seven intents, and a list of slots whose values are copied
# from the text. No teacher runs; the model named here provides the tokenizer of the answer.
name = 'snips'
dataset = 'snips'      # python data/snips/prepare.py 2017-06-custom-intent-engines makes its input.jsonl
labels = 'data/snips/input.jsonl'
teacher = 'data/teachers/qwen2.5-coder-0.5b.gguf'  # python data/teachers/prepare.py qwen2.5-coder-0.5b
_slots = '''
    album artist best_rating city condition_description condition_temperature country cuisine current_location
    entity_name facility genre geographic_poi location_name movie_name movie_type music_item object_location_type
    object_name object_part_of_series_type object_select object_type party_size_description party_size_number playlist
    playlist_owner poi rating_unit rating_value restaurant_name restaurant_type served_dish service sort
    spatial_relation state timeRange track year
'''
fields = {
    'intent': ['AddToPlaylist', 'BookRestaurant', 'GetWeather', 'PlayMusic', 'RateBook', 'SearchCreativeWork',
               'SearchScreeningEvent'],
    'slots': {'type': 'array', 'maxItems': 8, 'items': {
        'type': 'object', 'required': ['slot', 'value'],
        # where it is before what it is: a student that decides the kind first has to guess which words come next
        'properties': {'value': {'type': 'string'}, 'slot': {'enum': _slots.split()}}}}}
max_text = 48          # tokens; the longest text has 43
# student: a pre-trained encoder reads the text, one layer writes the answer
reader = 'data/teachers/minilm'  # python data/teachers/prepare.py minilm
n_layer = 1
n_head = 6
n_embd = 384
n_mlp = 1536
block_size = 200       # tokens of the encoder, and those of the longest answer
# training: the labels are certain, so the KL is the cross-entropy; but all places of a value share its probability
kd_temperature = 1.0
max_epochs = 7
batch_size = 32
learning_rate = 1e-3
min_lr = 1e-4
