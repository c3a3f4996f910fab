#!/usr/bin/env bash
# The same Hydra override range(6,18,6) is {6, 12} for the basic sweeper and {6, 12, 18} for the Optuna sweeper.
#
# range(start,stop,step) excludes stop in Hydra's override grammar, as in Python, and the basic sweeper runs 6 and 12.
# The Optuna sweeper hands start and stop to Optuna's distributions, which include both ends: it also draws 18, and
# 1.0 from range(0,1,0.25). A search that is meant to repeat a grid trains settings outside of it, and one whose
# stop is the size of a table (an index, a number of experts) reaches one past its end. No warning is printed.
#
# Seen with hydra-core 1.3.8, hydra-optuna-sweeper 1.2.0, Optuna 2.10.1 and SQLAlchemy 1.4.54, Python 3.11, 2026-11-29.
# Exits with 1 if the values are no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet \
    hydra-core==1.3.8 hydra-optuna-sweeper==1.2.0 optuna==2.10.1 sqlalchemy==1.4.54 numpy==2.4.6
cd "$folder"
cat > app.py <<'PYTHON'
import hydra


@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    with open("values.txt", "a") as file:
        file.write(f"{cfg.x}\n")
    return float(cfg.x)


main()
PYTHON
values() {  # the distinct values of x that a sweep runs
    rm -f values.txt
    venv/bin/python app.py -m hydra.sweep.dir=sweep hydra.job.chdir=false "$@" > log.txt 2>&1 || { cat log.txt; exit 1; }
    sort -g -u values.txt | tr '\n' ' '
}
optuna=(hydra/sweeper=optuna hydra.sweeper.n_trials=40 hydra.sweeper.n_jobs=1 hydra.sweeper.sampler.seed=0)
found=""
for range in 'range(6,18,6)' 'range(0,1,0.25)'; do
    basic=$(values "+x=$range")
    search=$(values "${optuna[@]}" "+x=$range")
    echo "$range  basic sweeper: $basic  Optuna sweeper: $search"
    found+="$basic| $search/ "
done
[ "$found" = "6 12 | 6 12 18 / 0.0 0.25 0.5 0.75 | 0.0 0.25 0.5 0.75 1.0 / " ]
