# make demo: teacher -> logits -> student -> JSON, for real, on two CPU cores.  make test: the behaviour tests.
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo test clean

demo: .venv/installed
	python data/chitchat/prepare.py
	python data/teachers/prepare.py qwen2.5-coder-0.5b
	python extract.py config/demo.py
	python train.py config/demo.py
	python evaluate.py config/demo.py

test: .venv/installed
	pytest -q -n 2

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache
