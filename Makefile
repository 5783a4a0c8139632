# `make help` lists what there is. Two commands do everything, `make demo` and `make test`; each makes the environment when it is missing.
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
READY := $(VENV)/.ready
VERSIONS := --constraint=constraints.txt --build-constraint=constraints.txt
DEMO := data/demo
RUN := runs/demo
SPACE := 8
PAPERMILL = "$(BIN)/papermill" --no-progress-bar --log-level ERROR
export NO_ALBUMENTATIONS_UPDATE := 1

.PHONY: help install lab docs newest constraints demo rehearsal test slow variants tta coverage versions bench bench-gpu shape check readme kernel clean

help: ## this list
	@awk -F ':.* ## ' '/^[a-z-]+:.* ## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

# nbdev merges notebooks cell by cell, so that a conflict leaves them readable; written into this clone's .git, nowhere else
install: $(READY) ## the environment in .venv, and nbdev's way of merging notebooks
	@if [ -e .git ] && common=$$(git rev-parse --git-common-dir 2> /dev/null) && [ -w "$$common/config" ]; then \
	    mkdir -p "$$common/info" && touch "$$common/info/attributes" && \
	    git config --local merge.nbdev-merge.name "merge notebooks cell by cell" && \
	    git config --local merge.nbdev-merge.driver '"$(BIN)/nbdev_merge" %O %A %B %P' && \
	    { grep -q nbdev-merge "$$common/info/attributes" || echo '*.ipynb merge=nbdev-merge' >> "$$common/info/attributes"; }; \
	fi
	@echo "ready: . $(VENV)/bin/activate"

# kernels warn that other users of this machine could listen in, and call their own end an error; what fails in a cell is in the notebook
$(READY): settings.ini setup.py constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "there is no $(PYTHON) here: install Python 3.11, 3.12 or 3.13, or name yours, make install PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is $$($(PYTHON) -V 2>&1), and 3.11, 3.12 or 3.13 is needed: name another, make install PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2> /dev/null || { echo "$(PYTHON) cannot make environments: apt-get install python3-venv, or name another Python, make install PYTHON=python3.12"; exit 1; }
	@free=$$(df -Pk . | awk 'NR == 2 { print int($$4 / 1048576) }'); test -x "$(BIN)/pip" || test "$$free" -ge $(SPACE) || { \
	    echo "$$free GB are free here, and the environment needs up to $(SPACE) while it is installed: make room, or say make install SPACE=$$free to try"; exit 1; }
	@echo "== install into $(VENV): some minutes, most of them for PyTorch"
	@$(PYTHON) -m venv $(VENV)
	@"$(BIN)/python" -m pip install -qq --upgrade $(filter-out --build-constraint=%,$(VERSIONS)) pip
	@"$(BIN)/python" -m pip install -qq $(VERSIONS) --editable '.[dev]'
	@mkdir -p $(VENV)/etc/ipython
	@echo 'c.IPKernelApp.log_level = "CRITICAL"' > $(VENV)/etc/ipython/ipython_kernel_config.py
	@touch $@

# what only some people want is installed when it is called for
$(VENV)/.lab $(VENV)/.docs: $(VENV)/.%: $(READY)
	@echo "== install what make $* needs"
	@"$(BIN)/python" -m pip install -qq $(VERSIONS) --editable '.[$*]'
	@touch $@

# Jupyter cleans notebooks as nbdev does when it saves them, and does not ask for news; settings of this environment alone
lab: $(VENV)/.lab ## JupyterLab with the project's kernel, train_fold open
	@mkdir -p $(VENV)/etc/jupyter/labconfig
	@echo '{"FileContentsManager": {"pre_save_hook": "nbdev.clean.clean_jupyter"}}' > $(VENV)/etc/jupyter/jupyter_server_config.json
	@echo '{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}' > $(VENV)/etc/jupyter/labconfig/page_config.json
	@JUPYTER_PREFER_ENV_PATH=1 "$(BIN)/jupyter" lab --LabApp.default_url=/lab/tree/notebooks/train_fold.ipynb $(LAB)

docs: $(VENV)/.docs ## the site from the notebooks: _docs/html/index.html
	@echo "== lay out the pages: _docs/source"
	@"$(BIN)/python" docs/assemble.py _docs/source
	@echo "== build the site: _docs/html/index.html"
	@"$(BIN)/python" -m sphinx -aqW --keep-going -c docs -d _docs/doctrees -b html _docs/source _docs/html

# the tests with the newest versions instead of those in constraints.txt, in an environment beside the usual one
newest: ## the tests with the newest versions of everything
	@rm -f .venv-newest/.ready .venv-newest/.lab .venv-newest/.docs
	@$(MAKE) --no-print-directory test .venv-newest/.lab .venv-newest/.docs VENV=.venv-newest VERSIONS='--upgrade --upgrade-strategy=eager'

# after a green `make newest`: its versions are the tested ones from now on
constraints: ## after a green make newest: pin its versions
	@.venv-newest/bin/python -m pip freeze --all --exclude-editable > .venv-newest/versions.txt
	@{ grep '^#' constraints.txt; sed -E '/^(cuda|nvidia|triton)/s/$$/ ; sys_platform == "linux"/' .venv-newest/versions.txt; } > .venv-newest/constraints.txt
	@mv .venv-newest/constraints.txt constraints.txt

# the demo and the variants, which share photographs, are to give the same numbers on every x86-64 processor with AVX2: one code path of each library, one thread a fold
demo variants: export ATEN_CPU_CAPABILITY := avx2
demo variants: export ONEDNN_MAX_CPU_ISA := AVX2
demo variants: export MKL_CBWR := COMPATIBLE
demo variants: export NPY_DISABLE_CPU_FEATURES := X86_V4 AVX512_ICL AVX512_SPR
demo variants: export OMP_NUM_THREADS := 1

# photographs, folds, report, weights, and the kernel run as Kaggle would run it; what each step says is in the log
demo: $(READY) ## photographs, five folds, a report, weights, and the Kaggle notebook: minutes
	@rm -f "$(RUN)/demo.log"
	@.ci/step "$(RUN)/demo.log" 1/5 "draw photographs" "$(BIN)/biomass_demo" --out "$(DEMO)" --n-train 96 --n-test 24 --seed 0
	@COUNT='cat "$(RUN)"/fold*/metrics.csv 2> /dev/null | grep -c "^[0-9]"' ALL=150 \
	    .ci/step "$(RUN)/demo.log" 2/5 "train five folds, two at a time" "$(BIN)/biomass_folds" notebooks/params/demo.yaml --jobs 2
	@.ci/step "$(RUN)/demo.log" 3/5 "write the report" "$(BIN)/biomass_report" "$(RUN)"
	@.ci/step "$(RUN)/demo.log" 4/5 "gather the weights, build the Kaggle notebook" sh -c '"$$1/biomass_weights" "$$2" && "$$1/biomass_kernel"' sh "$(BIN)" "$(RUN)"
	@.ci/step "$(RUN)/demo.log" 5/5 "run it as Kaggle would" $(MAKE) --no-print-directory rehearsal
	@"$(BIN)/python" .ci/score.py "$(RUN)" "$(RUN)/report.html" "$(RUN)/rehearsal/working/submission.csv"

# copies lay the inputs out as on Kaggle; the notebook runs in a folder of its own
rehearsal: $(READY) ## the Kaggle notebook on the demo data, as Kaggle would run it
	@echo "== run the kernel as Kaggle would: $(RUN)/rehearsal/working/submission.csv"
	@rm -rf "$(RUN)/rehearsal"
	@mkdir -p "$(RUN)/rehearsal/input/competitions" "$(RUN)/rehearsal/input/datasets/you" "$(RUN)/rehearsal/working"
	@cp -r "$(DEMO)" "$(RUN)/rehearsal/input/competitions/csiro-biomass"
	@cp -r kaggle/weights "$(RUN)/rehearsal/input/datasets/you/csiro-biomass-weights"
	@cd "$(RUN)/rehearsal/working" && BIOMASS_INPUT=../input $(PAPERMILL) "$(CURDIR)/kaggle/inference/inference.ipynb" inference.ipynb
	@head -3 "$(RUN)/rehearsal/working/submission.csv"

# a test that is stuck for twenty minutes says where, and fails; the others go on
STUCK := -o faulthandler_timeout=1200 -o faulthandler_exit_on_timeout=true --max-worker-restart=1

test: $(READY) check ## make check, every notebook, every test (SLOW=1: the slow ones, too)
	@echo "== run every notebook"
	@OMP_NUM_THREADS=1 "$(BIN)/nbdev_test" --n_workers 2
	@echo "== run the end-to-end tests"
	@OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -q -rs -n 2 --dist loadfile $(STUCK) tests $(if $(SLOW),--slow)

slow: $(READY) ## the slow tests alone: kills, faults, sweeps
	@echo "== run the slow tests"
	@OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -q -rs -n 2 --dist loadfile $(STUCK) tests --slow -m slow

# all variants of the model on the demo data, an hour or more on two cores; folds that are done are not trained again
variants: $(READY) ## all variants of the model on the demo data
	@echo "== train all variants: runs/variants"
	@"$(BIN)/biomass_demo" --out "$(DEMO)" --n-train 96 --n-test 24 --seed 0
	@mkdir -p runs/variants
	@$(PAPERMILL) notebooks/variants.ipynb runs/variants/variants.ipynb \
	    -p data_dir "$(DEMO)" -p settings notebooks/params/demo.yaml -p runs_dir runs/variants
	@cat runs/variants/variants.csv runs/variants/maps.csv

# what views, weights of the models, the projection and half precision change, on out-of-fold predictions; of any run: make tta RUN=runs/NAME
tta: $(READY) ## what views, weights and projection change on a run (RUN=runs/NAME)
	@echo "== predict the held-out photographs step by step: $(RUN)/tta.ipynb"
	@OMP_NUM_THREADS=1 $(PAPERMILL) notebooks/tta.ipynb "$(RUN)/tta.ipynb" -p run_dir "$(RUN)"
	@cat "$(RUN)/tta.csv"

# three renderings with seeds that no training uses; of any run on demo photographs: make coverage RUN=runs/NAME
coverage: $(READY) ## whether the intervals of a demo run hold on rendered paddocks (RUN=runs/NAME)
	@echo "== predict rendered paddocks whose means are known: $(RUN)/coverage.ipynb"
	@OMP_NUM_THREADS=1 $(PAPERMILL) notebooks/coverage.ipynb "$(RUN)/coverage.ipynb" -p weights "$(RUN)" \
	    -y '{seeds: [101, 102, 103]}' -p photos 160 -p out_dir "$(RUN)"

# the built kernel in an environment of older versions, 6 GB of downloads, against the library in this one
versions: $(READY) ## the Kaggle notebook with older versions of its libraries
	@echo "== run the kernel with older versions"
	@test -x .venv-older/bin/python || $(PYTHON) -m venv .venv-older
	@.venv-older/bin/python -m pip install -qq --requirement tests/older.txt
	@BIOMASS_OLDER=.venv-older/bin/python "$(BIN)/python" -m pytest -q -s tests/test_kernel.py -k older_versions

# what is quoted in the README; nothing else should run meanwhile
bench: $(READY) ## the benchmarks
	@mkdir -p runs/bench
	@for name in loading training predict field sweep; do \
	    echo "== measure $$name: runs/bench/bench_$$name.ipynb" && \
	    $(PAPERMILL) notebooks/bench_$$name.ipynb runs/bench/bench_$$name.ipynb -f notebooks/params/bench_$$name.yaml || exit 1; \
	done
	@head -50 runs/bench/*.csv

# the same loop on a GPU with larger networks: float16, bfloat16, waiting for data, use of the card
bench-gpu: $(READY) ## training on a GPU with larger networks
	@echo "== measure training on a GPU: runs/bench_gpu/bench_training.ipynb"
	@mkdir -p runs/bench_gpu
	@$(PAPERMILL) notebooks/bench_training.ipynb runs/bench_gpu/bench_training.ipynb -f notebooks/params/bench_training_gpu.yaml
	@head -50 runs/bench_gpu/*.csv

# everything that is built is built again elsewhere and compared, so that nothing of yours is overwritten
check: $(READY) ## whether everything built is in step with the notebooks
	@echo "== compare what is built with the notebooks"
	@copy=$$(mktemp -d) && trap 'rm -rf "$$copy"' EXIT && \
	mkdir -p "$$copy/kaggle/weights" && cp kaggle/weights/*.json "$$copy/kaggle/weights" && cp -r kaggle/inference kaggle/training "$$copy/kaggle" && \
	cp -r settings.ini Makefile notebooks "$$copy" && cd "$$copy" && \
	"$(BIN)/nbdev_clean" && "$(BIN)/nbdev_export" && "$(BIN)/biomass_kernel" > /dev/null && \
	$(MAKE) -s --no-print-directory readme BIN="$(BIN)" && \
	cd "$(CURDIR)" && for part in notebooks biomass_lib kaggle/inference kaggle/training README.md; do \
	    diff -rq -x __pycache__ -x .ipynb_checkpoints -x runs -x '.*' "$$part" "$$copy/$$part" > "$$copy/differs" || { \
	        echo "$$part is out of step with the notebooks:"; sed "s#$$copy/#built: #" "$$copy/differs"; \
	        echo "remedy: edit the notebook, then nbdev_export, nbdev_clean, make kernel readme"; exit 1; }; \
	done
	@"$(BIN)/ruff" check --quiet .
	@"$(BIN)/ruff" format --quiet --check notebooks tests setup.py

# the size of the code in numbers; of several checkouts: tests/shape.py . ../other
shape: $(READY) ## the size of the code in numbers
	@"$(BIN)/python" tests/shape.py

readme: ## README.md from notebooks/index.ipynb
	@"$(BIN)/jupyter" nbconvert --log-level WARN --to markdown --stdout \
	    --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_cell_tags=remove notebooks/index.ipynb | \
	    sed -E 's#\]\((images/|[a-z0-9_]+[.]ipynb)#](notebooks/\1#g; s#\]\(\.\./#](#g' > README.md.new
	@mv README.md.new README.md

kernel: $(READY) ## the Kaggle notebook, built from the library
	@"$(BIN)/biomass_kernel"

clean: ## remove what commands made: runs, cache, demo data, weights
	@rm -rf runs cache data/demo kaggle/weights/*.safetensors kaggle/weights/manifest.json kaggle/weights/README.md build dist .pytest_cache .ruff_cache _docs
