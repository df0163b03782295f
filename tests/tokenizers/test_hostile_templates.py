"""A template is a program from the internet: nothing escapes, and each is stopped within a second and 256 MiB."""

import gc
import os
import threading
import time
from pathlib import Path

import pytest

from llmtune.errors import LlmtuneFormatError
from llmtune.tokenizers.jinja_process import Failure, Render, TemplateProcess, job
from tests.tokenizers.templates import HOSTILE

VARIABLES = {
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
    "tools": None,
    "add_generation_prompt": False,
    "bos_token": "<s>",
}
JOB = job(Render(VARIABLES, (1,)), Render(VARIABLES))


def largest(pid, peak, stop):
    """The peak of a process's memory, in kB, as the kernel counts it."""
    while not stop.is_set():
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return
        peak.extend(int(line.split()[1]) for line in lines if line.startswith(("VmHWM", "VmPeak")))
        time.sleep(0.01)


def test_there_are_at_least_20():
    assert len(HOSTILE) >= 20


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_stopped(name, tmp_path):
    source = HOSTILE[name].replace("PROOF", str(tmp_path / "proof"))
    try:
        process = TemplateProcess(source, name)
        process.check()
    except LlmtuneFormatError as error:  # caught while it was compiled
        assert len(str(error).splitlines()) == 1
        return
    peak, stop = [], threading.Event()
    watch = threading.Thread(target=largest, args=(process._worker.pid, peak, stop))
    watch.start()
    begin = time.perf_counter()
    answer = process.render([JOB])[0]
    took = time.perf_counter() - begin
    stop.set()
    watch.join()
    assert took < 1.0, took
    assert not peak or max(peak) <= 256 * 1024
    assert not (tmp_path / "proof").exists()
    if not isinstance(
        answer, Failure
    ):  # the sandbox gave it nothing: no object of Python's can be read out of the text
        assert all("<" not in text.text and "root:" not in text.text and "object" not in text.text for text in answer)
        assert [len(text.text) for text in answer] <= [200, 200]


def test_after_a_process_was_ended_the_others_are_rendered():
    slow = "{% if messages[0].content == 'slow' %}" + HOSTILE["endless"] + "{% endif %}{{ messages[0].content }}"
    process = TemplateProcess(slow, "sometimes slow")

    def of(text):
        return job(Render({"messages": [{"role": "user", "content": text}]}))

    texts = ["a", "b", "slow", "c", "slow", "d"]
    answers = process.render([of(text) for text in texts])
    assert ["slow" if isinstance(a, Failure) else a[0].text for a in answers] == texts
    assert "takes more than" in answers[2].why


def test_what_is_compiled_is_bounded_too():
    for source in (
        "{{ 'a' * 10 ** 11 }}",
        "{% if " + "(" * 100_000 + "1" + ")" * 100_000 + " %}{% endif %}",
        "{% for x in y %}" * 2000,
    ):
        begin = time.perf_counter()
        try:
            TemplateProcess(source, "hostile").render([JOB])
        except LlmtuneFormatError as error:
            assert len(str(error).splitlines()) == 1
        assert time.perf_counter() - begin < 3


def test_the_process_has_no_files_no_environment_and_no_way_to_get_them(monkeypatch):
    monkeypatch.setenv("LLMTUNE_SECRET", "x")
    process = TemplateProcess("x", "plain")
    process.check()
    root = Path(f"/proc/{process._worker.pid}")
    assert b"LLMTUNE_SECRET" not in (root / "environ").read_bytes()
    limits = {line[:26].strip(): line[26:47].strip() for line in (root / "limits").read_text().splitlines()}
    assert limits["Max address space"] == str(256 * 2**20)
    assert limits["Max open files"] == "3" and limits["Max file size"] == limits["Max core file size"] == "0"
    opened = {os.readlink(link).split(":")[0] for link in (root / "fd").iterdir()}
    assert opened <= {"pipe", "/dev/null"}


def test_it_ends_with_its_owner():
    process = TemplateProcess("x", "plain")
    process.check()
    pid = process._worker.pid
    del process
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_fork_gets_a_process_of_its_own():
    process = TemplateProcess("{{ messages[0].content }}", "plain")
    hi = job(Render(VARIABLES))
    assert process.render([hi])[0][0].text == "Hi"
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, process.render([hi] * 3)[2][0].text.encode())
        del process  # ends the fork's own, and leaves that of its parent alone
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 10) == b"Hi"
    assert [a[0].text for a in process.render([hi] * 3)] == ["Hi"] * 3


def test_threads_may_share_it():
    process = TemplateProcess("{{ messages[0].content }}", "plain")
    wrong = []

    def work(text):
        for _ in range(20):
            answers = process.render([job(Render({"messages": [{"content": text}]}))] * 5)
            wrong.extend(a for a in answers if a[0].text != text)

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
