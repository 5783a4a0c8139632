# Two commands do everything: `make demo` and `make test`. Both make the environment when it is missing.
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
READY := .venv/.ready
DEMO := data/demo
RUN := runs/demo
export NO_ALBUMENTATIONS_UPDATE := 1

.PHONY: install demo rehearsal test variants tta versions bench bench-gpu check readme kernel clean

install: $(READY)

$(READY): settings.ini setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

# photographs, folds, report, weights, and the kernel run as Kaggle would run it
demo: $(READY)
	$(BIN)/biomass_demo --out $(DEMO) --n-train 96 --n-test 24 --seed 0
	$(BIN)/biomass_folds notebooks/params/demo.yaml --jobs 2
	$(BIN)/biomass_report $(RUN)
	$(BIN)/biomass_weights $(RUN)
	$(BIN)/biomass_kernel
	$(MAKE) --no-print-directory rehearsal

# copies lay the inputs out as on Kaggle; the notebook runs in a folder of its own
rehearsal: $(READY)
	rm -rf $(RUN)/rehearsal
	mkdir -p $(RUN)/rehearsal/input/competitions $(RUN)/rehearsal/input/datasets/you $(RUN)/rehearsal/working
	cp -r $(DEMO) $(RUN)/rehearsal/input/competitions/csiro-biomass
	cp -r kaggle/weights $(RUN)/rehearsal/input/datasets/you/csiro-biomass-weights
	cd $(RUN)/rehearsal/working && BIOMASS_INPUT=$(CURDIR)/$(RUN)/rehearsal/input $(BIN)/papermill \
	    --no-progress-bar --log-level ERROR $(CURDIR)/kaggle/inference/inference.ipynb inference.ipynb
	@echo "submission: $(RUN)/rehearsal/working/submission.csv"; head -3 $(RUN)/rehearsal/working/submission.csv

test: $(READY) check
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests $(if $(SLOW),--slow)

# all variants of the model on the demo data, six minutes on the two cores of the README; folds that are done are not trained again
variants: $(READY)
	$(BIN)/biomass_demo --out $(DEMO) --n-train 96 --n-test 24 --seed 0
	mkdir -p runs/variants
	OMP_NUM_THREADS=1 $(BIN)/papermill --no-progress-bar --log-level ERROR notebooks/variants.ipynb runs/variants/variants.ipynb \
	    -p data_dir $(DEMO) -p settings notebooks/params/demo.yaml -p runs_dir runs/variants
	@cat runs/variants/variants.csv runs/variants/maps.csv

# what views, weights of the models, the projection and half precision change, on out-of-fold predictions; of any run: make tta RUN=runs/NAME
tta: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/papermill --no-progress-bar --log-level ERROR notebooks/tta.ipynb $(RUN)/tta.ipynb -p run_dir $(RUN)
	@cat $(RUN)/tta.csv

# the built kernel in an environment of older versions, 6 GB of downloads, against the library in this one
versions: $(READY)
	test -x .venv-older/bin/python || $(PYTHON) -m venv .venv-older
	.venv-older/bin/pip install --quiet --requirement tests/older.txt
	BIOMASS_OLDER=.venv-older/bin/python $(BIN)/python -m pytest -q -s tests/test_kernel.py -k older_versions

# what is quoted in the README; nothing else should run meanwhile
bench: $(READY)
	mkdir -p runs/bench
	$(BIN)/papermill --no-progress-bar --log-level ERROR notebooks/bench_loading.ipynb runs/bench/bench_loading.ipynb \
	    -f notebooks/params/bench_loading.yaml
	$(BIN)/papermill --no-progress-bar --log-level ERROR notebooks/bench_training.ipynb runs/bench/bench_training.ipynb \
	    -f notebooks/params/bench_training.yaml
	$(BIN)/papermill --no-progress-bar --log-level ERROR notebooks/bench_predict.ipynb runs/bench/bench_predict.ipynb \
	    -f notebooks/params/bench_predict.yaml
	@head -50 runs/bench/*.csv

# the same loop on a GPU with larger networks: float16, bfloat16, waiting for data, use of the card
bench-gpu: $(READY)
	mkdir -p runs/bench_gpu
	$(BIN)/papermill --no-progress-bar --log-level ERROR notebooks/bench_training.ipynb runs/bench_gpu/bench_training.ipynb \
	    -f notebooks/params/bench_training_gpu.yaml
	@head -50 runs/bench_gpu/*.csv

# everything that is built is built again elsewhere and compared, so that nothing of yours is overwritten
check: $(READY)
	@copy=$$(mktemp -d) && trap 'rm -rf "$$copy"' EXIT && \
	mkdir -p "$$copy/kaggle/weights" && cp kaggle/weights/*.json "$$copy/kaggle/weights" && cp -r kaggle/inference "$$copy/kaggle" && \
	cp -r settings.ini Makefile notebooks "$$copy" && cd "$$copy" && \
	$(BIN)/nbdev_clean && $(BIN)/nbdev_export && $(BIN)/biomass_kernel > /dev/null && $(MAKE) -s --no-print-directory readme BIN=$(BIN) && \
	cd "$(CURDIR)" && for part in notebooks biomass_lib kaggle/inference README.md; do \
	    diff -rq -x __pycache__ -x .ipynb_checkpoints -x runs -x '.*' "$$part" "$$copy/$$part" > "$$copy/differs" || { \
	        echo "$$part is out of step with the notebooks:"; sed "s#$$copy/#built: #" "$$copy/differs"; \
	        echo "remedy: edit the notebook, then nbdev_export, nbdev_clean, make kernel readme"; exit 1; }; \
	done
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --quiet --check notebooks tests setup.py

readme:
	$(BIN)/jupyter nbconvert --log-level WARN --to markdown --stdout \
	    --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_cell_tags=remove notebooks/index.ipynb | \
	    sed -E 's#\]\((images/|[a-z0-9_]+[.]ipynb)#](notebooks/\1#g; s#\]\(\.\./#](#g' > README.md.new
	mv README.md.new README.md

kernel: $(READY)
	$(BIN)/biomass_kernel

clean:
	rm -rf runs cache data/demo kaggle/weights/*.safetensors kaggle/weights/manifest.json kaggle/weights/README.md build dist .pytest_cache .ruff_cache
