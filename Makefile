# make demo: teacher -> logits -> student -> JSON, for real, on two CPU cores.  make test: the behaviour tests;
# make slow: those that take long; make all-tests: both at once, which prepares what they share once.
# make web, after make demo: the student as a page in a browser.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo web test slow all-tests clean

demo: .venv/installed
	python data/chitchat/prepare.py
	python data/teachers/prepare.py qwen2.5-coder-0.5b minilm
	python extract.py config/demo.py
	python train.py config/demo.py
	python tools/evaluate.py config/demo.py

web: .venv/installed
	python device/export.py config/demo.py
	python device/web.py config/demo.py

test: .venv/installed
	python -m pytest -q -n 2 --dist worksteal -m 'not slow'

slow: .venv/installed
	python -m pytest -q -n 2 --dist worksteal -m slow

all-tests: .venv/installed
	python -m pytest -q -n 2 --dist worksteal

.venv/installed: requirements.txt requirements-serve.txt requirements-device.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache
