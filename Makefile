# make demo: set up, then train the embedded demo by SFT, DPO and GRPO, offline. make test: set up, then test.
# make lint: ruff. make bench: measure on this CPU, beside TRL; make bench-quick: try every benchmark, small.
# make soak: runs under fire.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1

.PHONY: demo test lint bench bench-quick gpu soak
# one thread: a model this small gains little from a second, and loses much where another program wants the core
demo: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python sft_packing.py --learning_rate 1e-3 --measure_memory \
		--eval_dataset_name demo/sft_eval.jsonl --output_dir outputs/demo/sft --overwrite_output_dir
	head -n 480 demo/preferences.jsonl > outputs/demo/preferences.jsonl
	tail -n 120 demo/preferences.jsonl > outputs/demo/preferences_eval.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python dpo_padding_free.py --learning_rate 3e-4 --per_device_train_batch_size 8 \
		--measure_memory --dataset_name outputs/demo/preferences.jsonl \
		--eval_dataset_name outputs/demo/preferences_eval.jsonl --output_dir outputs/demo/dpo --overwrite_output_dir
	head -n 32 demo/prompts.jsonl > outputs/demo/prompts.jsonl
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node 2 grpo_zero3.py \
		--learning_rate 2e-4 --max_steps 32 --per_device_train_batch_size 64 --max_completion_length 40 \
		--dataset_name outputs/demo/prompts.jsonl --log_completions_steps 16 \
		--output_dir outputs/demo/grpo --overwrite_output_dir

test: .venv/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/build_extensions.py
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

# one after another, or they would slow each other down; then the pages' tables and the figures from the JSON
COMPARED := packing loss_head sft dpo grpo_update
BENCH := benchmarks/.venv/bin
bench: benchmarks/.venv/.installed
	for name in $(COMPARED); do $(BENCH)/python benchmarks/$$name.py || exit 1; done
	PATH="$(CURDIR)/$(BENCH):$$PATH" OMP_NUM_THREADS=1 $(BENCH)/torchrun --standalone --nproc_per_node 2 \
		benchmarks/zero3_generation.py
	$(BENCH)/python benchmarks/tables.py
	$(BENCH)/python benchmarks/figures.py

# on one GPU: its tests, then the benchmarks that a GPU decides
gpu: benchmarks/.venv/.installed
	PYTHON=$(BENCH)/python bash benchmarks/on_a_gpu.sh outputs/gpu
	cp outputs/gpu/*.json benchmarks/results/
	$(BENCH)/python benchmarks/tables.py
	$(BENCH)/python benchmarks/figures.py

# leaves pages, results and figures alone
bench-quick: benchmarks/.venv/.installed
	for name in $(COMPARED); do \
		$(BENCH)/python benchmarks/$$name.py --quick || exit 1; done
	PATH="$(CURDIR)/$(BENCH):$$PATH" OMP_NUM_THREADS=1 $(BENCH)/torchrun --standalone --nproc_per_node 2 \
		benchmarks/zero3_generation.py --quick
	cp README.md outputs/bench-quick/README.md
	cp benchmarks/README.md outputs/bench-quick/benchmarks.md
	$(BENCH)/python benchmarks/tables.py --results outputs/bench-quick \
		--pages outputs/bench-quick/README.md outputs/bench-quick/benchmarks.md
	$(BENCH)/python benchmarks/figures.py --results outputs/bench-quick --figures outputs/bench-quick

benchmarks/.venv/.installed: benchmarks/requirements.txt requirements.txt
	$(PYTHON) -m venv benchmarks/.venv
	$(BENCH)/python -m pip install --quiet -r benchmarks/requirements.txt
	touch $@

# made again when requirements.txt changes, and at once otherwise
.venv/.installed: requirements.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

# runs that are killed, stopped, starved of disk and fed with bad input; unshare: the right to mount a small disk
soak: .venv/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(shell unshare -rm true 2>/dev/null && echo unshare -rm) \
		$(BIN)/python benchmarks/soak.py
	$(BIN)/python benchmarks/tables.py
