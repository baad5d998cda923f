"""Arguments of wrong types, as a caller without a type checker gives them: one ``UserError`` each that names them."""

import json
import subprocess
import sys
from pathlib import Path

SITE = "blocks.1.hook_resid_post"
CASES = {
    "calibrate(model, vectors, kl='0.1')": "calibrate's kl must be a number, got '0.1'",
    "calibrate(model, 'v.safetensors')": "calibrate takes Vectors, one or a list of them; got str",
    "calibrate(model, vectors, signs='x')": "signs 1 or -1",
    "calibrate('organism:llama', vectors)": "calibrate's model must be Model, got str",
    "vectors.edits(coefficient='2')": "the coefficient must be a number, got '2'",
    "Vectors(arrays={SITE: [1.0, 2.0]})": f"the vector at {SITE} must be ndarray, got list",
    "Vectors(arrays=[ones])": "arrays must be dict, got list",
    "Vectors(arrays={SITE: ones}, coefficient='1')": "--coefficient must be a number, got '1'",
    "Vectors(arrays={SITE: ones}, mean_resid_norm={SITE: '3'})": "must be a number, got '3'",
    "Gate(site=SITE, vector=[[1.0], [1.0, 2.0]], threshold=0.5)": "the vector of a gate must be ndarray, got list",
    "Gate(site=SITE, vector=ones, threshold='0.5')": "--threshold must be a number, got '0.5'",
    "Gate(site=5, vector=ones, threshold=0.5)": "--site must be a text, got 5",
    "learn_scaling(model, ['a', 'b'], [1, 2], [3], SITE)": "for each of 2 prompts, got int64 [2] and int64 [1]",
    "learn_scaling(model, ['a'], ['x'], [3], SITE)": "give one token id of each answer",
    "learn_scaling(model, ['a'], [1], [3], SITE, scaling=Scaling(rate='fast'))": "--rate must be a number, got 'fast'",
    "learn_scaling(model, ['a'], [1], [3], SITE, scaling={'rate': 1})": "scaling must be Scaling, got dict",
    "learn_vectors(model, ['a text'], SITE)": "example 0 must be Example, got str",
    "learn_vectors(model, [example], SITE, learning=Learning(epochs='2'))": "--epochs must be a whole number, got '2'",
    "learn_vectors(model, [example], SITE, state=5)": "state, a file, must be str or Path or NoneType, got int",
    "measure(model, 5, 'a')": "persona must be str or Persona or Dataset or Questions, got int",
    "measure(model, 'sycophancy', edits='v.safetensors')": "steer.add ...) must be Intervention or NoneType, got str",
    "measure(model, 'sycophancy', 'a', questions='4')": "--questions must be a whole number or None, got '4'",
    "measure(3, 'sycophancy', 'a')": "a model of jaxsteer.measure must be str or Model, got int",
    "measure(model, 'sycophancy', [4])": "a prompt must be str, got int",
    "measure_refusal(model, requests, edits={'a': 'v.safetensors'})": "edit 'a' must be Intervention, got str",
    "measure_refusal(model, requests, max_new_tokens='4')": "--max-new-tokens must be a whole number, got '4'",
    "compare(CompareOptions(out=Path('x'), kl='0.1'))": "--kl must be a number, got '0.1'",
    "compare(CompareOptions(out=Path('x'), strengths=('1',)))": "--strengths must be a list in which each is a number",
    "compare({'out': 'x'})": "options must be CompareOptions, got dict",
}
PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
from jaxsteer import measure, measure_refusal
from jaxsteer.errors import UserError
from jaxsteer.evals.calibration import calibrate
from jaxsteer.personas import Requests
from jaxsteer.steer import Example, Gate, Learning, Scaling, Vectors, learn_scaling, learn_vectors
from jaxsteer.study.steer_compare import CompareOptions, compare
from tests.helpers.tiny import tiny_model
SITE, model, ones = "blocks.1.hook_resid_post", tiny_model(), np.ones(32, np.float32)
vectors, requests = Vectors(arrays={SITE: ones}), Requests.of(["a"], "harmful")
example = Example(context=np.asarray([1, 2]), wanted=np.asarray([3]))
said = {}
for case in json.load(sys.stdin):
    try:
        eval(case)
        said[case] = "nothing"
    except UserError as error:
        said[case] = str(error)
    except Exception as error:
        said[case] = f"{type(error).__name__}: {error}"
print(json.dumps(said))
"""


def test_wrong_types_are_one_message_each(tmp_path: Path) -> None:
    """In a process of its own, where annotations are not checked."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(list(CASES)), capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert {case: text for case, text in found.items() if CASES[case] not in text} == {}
