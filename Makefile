# Two commands do everything: `make demo` and `make test`. Both make the environment when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
READY := $(VENV)/.ready
VERSIONS := --constraint=constraints.txt --build-constraint=constraints.txt
DEMO := data/demo
RUN := runs/demo
PAPERMILL = "$(BIN)/papermill" --no-progress-bar --log-level ERROR
export NO_ALBUMENTATIONS_UPDATE := 1

.PHONY: install newest constraints demo rehearsal test variants tta versions bench bench-gpu shape check readme kernel clean

install: $(READY)

# kernels warn that other users of this machine could listen in, and call their own end an error; what fails in a cell is in the notebook
$(READY): settings.ini setup.py constraints.txt
	@echo "== install into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@"$(BIN)/python" -m pip install -qq --upgrade $(filter-out --build-constraint=%,$(VERSIONS)) pip
	@"$(BIN)/python" -m pip install -qq $(VERSIONS) --editable '.[dev]'
	@mkdir -p $(VENV)/etc/ipython
	@echo 'c.IPKernelApp.log_level = "CRITICAL"' > $(VENV)/etc/ipython/ipython_kernel_config.py
	@touch $@

# the tests with the newest versions instead of those in constraints.txt, in an environment beside the usual one
newest:
	@rm -f .venv-newest/.ready
	@$(MAKE) --no-print-directory test VENV=.venv-newest VERSIONS='--upgrade --upgrade-strategy=eager'

# after a green `make newest`: its versions are the tested ones from now on
constraints:
	@.venv-newest/bin/python -m pip freeze --all --exclude-editable > .venv-newest/versions.txt
	@{ grep '^#' constraints.txt; sed -E '/^(cuda|nvidia|triton)/s/$$/ ; sys_platform == "linux"/' .venv-newest/versions.txt; } > .venv-newest/constraints.txt
	@mv .venv-newest/constraints.txt constraints.txt

# the demo and the variants, which share photographs, are to give the same numbers on every x86-64 processor with AVX2: one code path of each library, one thread a fold
demo variants: export ATEN_CPU_CAPABILITY := avx2
demo variants: export ONEDNN_MAX_CPU_ISA := AVX2
demo variants: export MKL_CBWR := COMPATIBLE
demo variants: export NPY_DISABLE_CPU_FEATURES := X86_V4 AVX512_ICL AVX512_SPR
demo variants: export OMP_NUM_THREADS := 1

# photographs, folds, report, weights, and the kernel run as Kaggle would run it
demo: $(READY)
	@echo "== render photographs into $(DEMO)"
	@"$(BIN)/biomass_demo" --out "$(DEMO)" --n-train 96 --n-test 24 --seed 0
	@echo "== train five folds, two at a time"
	@"$(BIN)/biomass_folds" notebooks/params/demo.yaml --jobs 2
	@echo "== judge them: $(RUN)/report.html"
	@"$(BIN)/biomass_report" "$(RUN)"
	@echo "== assemble the weights in kaggle/weights"
	@"$(BIN)/biomass_weights" "$(RUN)"
	@echo "== build the kernel"
	@"$(BIN)/biomass_kernel"
	@$(MAKE) --no-print-directory rehearsal

# copies lay the inputs out as on Kaggle; the notebook runs in a folder of its own
rehearsal: $(READY)
	@echo "== run the kernel as Kaggle would: $(RUN)/rehearsal/working/submission.csv"
	@rm -rf "$(RUN)/rehearsal"
	@mkdir -p "$(RUN)/rehearsal/input/competitions" "$(RUN)/rehearsal/input/datasets/you" "$(RUN)/rehearsal/working"
	@cp -r "$(DEMO)" "$(RUN)/rehearsal/input/competitions/csiro-biomass"
	@cp -r kaggle/weights "$(RUN)/rehearsal/input/datasets/you/csiro-biomass-weights"
	@cd "$(RUN)/rehearsal/working" && BIOMASS_INPUT=../input $(PAPERMILL) "$(CURDIR)/kaggle/inference/inference.ipynb" inference.ipynb
	@head -3 "$(RUN)/rehearsal/working/submission.csv"

# a test that is stuck for twenty minutes says where, and fails; the others go on
STUCK := -o faulthandler_timeout=1200 -o faulthandler_exit_on_timeout=true --max-worker-restart=1

test: $(READY) check
	@echo "== run every notebook"
	@OMP_NUM_THREADS=1 "$(BIN)/nbdev_test" --n_workers 2
	@echo "== run the end-to-end tests"
	@OMP_NUM_THREADS=1 "$(BIN)/python" -m pytest -q -rs -n 2 --dist loadfile $(STUCK) tests $(if $(SLOW),--slow)

# all variants of the model on the demo data, a quarter of an hour on two cores; folds that are done are not trained again
variants: $(READY)
	@echo "== train all variants: runs/variants"
	@"$(BIN)/biomass_demo" --out "$(DEMO)" --n-train 96 --n-test 24 --seed 0
	@mkdir -p runs/variants
	@$(PAPERMILL) notebooks/variants.ipynb runs/variants/variants.ipynb \
	    -p data_dir "$(DEMO)" -p settings notebooks/params/demo.yaml -p runs_dir runs/variants
	@cat runs/variants/variants.csv runs/variants/maps.csv

# what views, weights of the models, the projection and half precision change, on out-of-fold predictions; of any run: make tta RUN=runs/NAME
tta: $(READY)
	@echo "== predict the held-out photographs step by step: $(RUN)/tta.ipynb"
	@OMP_NUM_THREADS=1 $(PAPERMILL) notebooks/tta.ipynb "$(RUN)/tta.ipynb" -p run_dir "$(RUN)"
	@cat "$(RUN)/tta.csv"

# the built kernel in an environment of older versions, 6 GB of downloads, against the library in this one
versions: $(READY)
	@echo "== run the kernel with older versions"
	@test -x .venv-older/bin/python || $(PYTHON) -m venv .venv-older
	@.venv-older/bin/python -m pip install -qq --requirement tests/older.txt
	@BIOMASS_OLDER=.venv-older/bin/python "$(BIN)/python" -m pytest -q -s tests/test_kernel.py -k older_versions

# what is quoted in the README; nothing else should run meanwhile
bench: $(READY)
	@mkdir -p runs/bench
	@for name in loading training predict sweep; do \
	    echo "== measure $$name: runs/bench/bench_$$name.ipynb" && \
	    $(PAPERMILL) notebooks/bench_$$name.ipynb runs/bench/bench_$$name.ipynb -f notebooks/params/bench_$$name.yaml || exit 1; \
	done
	@head -50 runs/bench/*.csv

# the same loop on a GPU with larger networks: float16, bfloat16, waiting for data, use of the card
bench-gpu: $(READY)
	@echo "== measure training on a GPU: runs/bench_gpu/bench_training.ipynb"
	@mkdir -p runs/bench_gpu
	@$(PAPERMILL) notebooks/bench_training.ipynb runs/bench_gpu/bench_training.ipynb -f notebooks/params/bench_training_gpu.yaml
	@head -50 runs/bench_gpu/*.csv

# everything that is built is built again elsewhere and compared, so that nothing of yours is overwritten
check: $(READY)
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
shape: $(READY)
	@"$(BIN)/python" tests/shape.py

readme:
	@"$(BIN)/jupyter" nbconvert --log-level WARN --to markdown --stdout \
	    --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_cell_tags=remove notebooks/index.ipynb | \
	    sed -E 's#\]\((images/|[a-z0-9_]+[.]ipynb)#](notebooks/\1#g; s#\]\(\.\./#](#g' > README.md.new
	@mv README.md.new README.md

kernel: $(READY)
	@"$(BIN)/biomass_kernel"

clean:
	@rm -rf runs cache data/demo kaggle/weights/*.safetensors kaggle/weights/manifest.json kaggle/weights/README.md build dist .pytest_cache .ruff_cache
