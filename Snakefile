# The batch: every run, table and figure, made again only if it is missing or out of date.
#
#   make tables BENCH=glyphs-20 SEEDS=3 JOBS=2     all tables (make table1, … for one), three seeds, two runs at a time;
#                                                  without SEEDS, each table has the number of seeds that data/tables.yaml names
#   make figures                                   all figures
#   make dry TARGET=tables                         what would run
#
# How to read this file: a rule makes a file (output) from others (input) by a command (shell), for every value of the names
# in braces. Snakemake starts from the requested rule (tables, table1, figures, …), finds the files that it needs, and runs
# the commands that make them, up to JOBS at a time. The part of a command after `--` can also be typed by hand;
# nbs/88_paper.batch.ipynb explains the part before it.
#
# Where to look: data/runs/<recipe>/seed<k>.ipynb is the executed notebook of a run, seed<k>.log its output (`tail -f` follows
# a long run), and the folder seed<k> holds checkpoints and weights. data/results/<recipe>/seed<k>.json is its record, from
# which tables and figures are made.
#
# After an interruption of any kind, the same command continues: finished runs stay, unfinished ones resume from their
# checkpoint. A run that fails does not stop the others. To repeat a run or a table, delete its output.
#
# Several GPUs: with JOBS=<number of GPUs>, every run gets one of its own. SLURM, from a login node with the folder on a
# shared disk:
#   make tables BENCH=voc JOBS=20 SNAKEMAKE="--executor slurm --default-resources slurm_partition=gpu gpu=1 runtime=2880"

import logging
import sys

from sptseg.paper.batch import lock_batch, read_seeds, say, sums_agree, write_plan
from sptseg.paper.tables import is_current, record_path, recipes_of, rows_of, seeds_of, table_names

BENCH = str(config.get("bench", "glyphs-20"))
TABLES = table_names(BENCH)
SEEDS = {table: read_seeds(config["seeds"]) if "seeds" in config else seeds_of(table, BENCH) for table in TABLES}

# Snakemake reports every step at length; the commands below report progress in one line each. Errors, dry runs and the
# messages of clusters are still shown.
if not {"-n", "--dry-run", "--executor"} & set(sys.argv):
    logging.getLogger("snakemake.logging").setLevel(logging.ERROR)


def parameters(table):
    """Parameters of the notebooks for tables and figures."""
    return f"bench: {BENCH}, seeds: {SEEDS[table]}, folder: figures"


def runs(tables):
    """Recipe and seed of all runs in some tables."""
    found = ((recipe, seed) for table in tables for recipe in recipes_of([table], BENCH) for seed in SEEDS[table])
    return list(dict.fromkeys(found))  # without repetition


def records(tables):
    """Records of all runs in some tables."""
    return [str(record_path(recipe, seed)) for recipe, seed in runs(tables)]


def sources(tables):
    """All files that determine the content of some tables."""
    rows = [row for table in tables for row in rows_of(table, BENCH)]
    measured = [f"data/results/{row.record}.json" for row in rows if row.record]
    recipes = [f"nbs/experiments/{name}.yaml" for row in rows for name in (row.recipe, row.of) if name]
    return sorted({"data/tables.yaml", "data/published.json", *records(tables), *measured, *recipes})


def sums(name):
    """The list of SHA-256 sums of the sources and products of a table or of the figures."""
    return f"data/results/sums/{BENCH}-{name}.txt"


# A file is out of date by content, since git keeps no times: a record of another recipe, or a table with a missing record,
# with changed sources or with deleted files. Only such files are inputs below, and `--forcerun` makes Snakemake remake all of
# them. A rule without input would always run, so its input is data/tables.yaml if nothing is out of date.
MISSING = {str(record_path(recipe, seed)) for recipe, seed in runs(TABLES) if not is_current(recipe, seed)}
DRAWN = {sums("figures"): TABLES, **{sums(table): [table] for table in TABLES}}  # list of sums → tables that it is about
OUTDATED = MISSING | {
    name for name, tables in DRAWN.items() if MISSING & set(records(tables)) or not sums_agree(name, sources(tables))
}
PLAN = set()  # records that this batch makes, to estimate the time


def outdated(files):
    found = [name for name in files if name in OUTDATED]
    PLAN.update(name for name in found if name.endswith(".json"))
    return found or ["data/tables.yaml"]


rule tables:
    input: outdated(sums(table) for table in TABLES)


for name in TABLES:  # the rules table1, table2, …
    rule:
        name: name
        input: outdated([sums(name)])


rule figures:
    input: outdated([sums("figures")])


# One run: a recipe with a seed. Checkpoints and weights are not outputs, because Snakemake deletes the outputs of a failed rule.
rule train:
    output: "data/results/{recipe}/seed{seed}.json"
    log: "data/runs/{recipe}/seed{seed}.ipynb", "data/runs/{recipe}/seed{seed}.log"
    message: "run {wildcards.recipe}, seed {wildcards.seed}"
    shell:
        "python -m sptseg.paper.batch row {wildcards.recipe} {wildcards.seed} -- "
        "papermill nbs/runs/train.ipynb {log[0]} --log-output --no-progress-bar -f nbs/experiments/{wildcards.recipe}.yaml"
        " -p seed {wildcards.seed} -p out data/runs/{wildcards.recipe}/seed{wildcards.seed} -p record {output}"


# One table, as Markdown, CSV and LaTeX in figures/.
rule draw_table:
    input: lambda wildcards: outdated(records([wildcards.table]))
    output: "data/results/sums/{bench}-{table}.txt"
    log: "data/runs/tables/{bench}-{table}.ipynb", "data/runs/tables/{bench}-{table}.log"
    message: "write figures/{wildcards.bench}-{wildcards.table}.md, .csv, .tex"
    wildcard_constraints: bench=BENCH, table="|".join(TABLES)
    params: sources=lambda wildcards: sources([wildcards.table]), given=lambda wildcards: parameters(wildcards.table)
    shell:
        "python -m sptseg.paper.batch step 'figures/{wildcards.bench}-{wildcards.table}.md, .csv, .tex' {log[0]} -- "
        "papermill nbs/runs/tables.ipynb {log[0]} --log-output --no-progress-bar"
        " -p table {wildcards.table} -y '{{{params.given}}}'"
        " && python -m sptseg.paper.batch sums {output} {params.sources} figures/{wildcards.bench}-{wildcards.table}.*"


# All figures of a benchmark in figures/, as PDF and PNG, and the two diagrams of the method as SVG.
rule draw_figures:
    input: lambda wildcards: outdated(records(TABLES))
    output: "data/results/sums/{bench}-figures.txt"
    log: "data/runs/figures/{bench}.ipynb", "data/runs/figures/{bench}.log"
    message: "draw figures/{wildcards.bench}-*.pdf, .png, .svg"
    wildcard_constraints: bench=BENCH
    params: sources=sources(TABLES), given=parameters("table1")
    shell:
        "python -m sptseg.paper.batch step 'figures/{wildcards.bench}-*.pdf, .png, .svg' {log[0]} -- "
        "papermill nbs/runs/figures.ipynb {log[0]} --log-output --no-progress-bar"
        " -p results data/results -p runs data/runs -y '{{{params.given}}}'"
        " && python -m sptseg.paper.batch sums {output} {params.sources} figures/{wildcards.bench}-*.pdf figures/{wildcards.bench}-*.png"
        " figures/{wildcards.bench}-*.svg"


LOCKS = []

onstart:
    LOCKS.append(lock_batch())
    write_plan(PLAN, workflow.cores)
    say(f"runs to make: {len(PLAN)}, {workflow.cores} at a time; each shows its progress in data/runs/<recipe>/seed<k>.log")

onerror:
    say("Not everything was made; what FAILED is named above. The same command tries again and keeps what is finished.")
