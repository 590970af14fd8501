"""Ask an endpoint over HTTP, in both protocols, with nothing but an HTTP client.

    python examples/predict.py [ENDPOINT]              the endpoint is called cancer unless you say otherwise

``MILLRACE_URL`` and ``MILLRACE_API_KEY`` say where and who, as for the command line.
"""

import os
import sys

import httpx
from sklearn.datasets import load_breast_cancer


def main(endpoint: str) -> None:
    """Three tumours: the labels by V1, labels and probabilities by V2."""
    samples = load_breast_cancer().data[:3]
    key = os.environ.get("MILLRACE_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=os.environ.get("MILLRACE_URL", "http://127.0.0.1:8080"), headers=headers, timeout=30) as gateway:
        answer = gateway.post(f"/v1/models/{endpoint}:predict", json={"instances": samples.tolist()})
        print("V1", told(answer)["predictions"], "by", answer.headers["x-millrace-model-version"])

        signature = told(gateway.get(f"/v2/models/{endpoint}"))
        tensor = {
            "name": signature["inputs"][0]["name"],
            "datatype": "FP64",
            "shape": list(samples.shape),
            "data": samples.ravel().tolist(),
        }
        body = {"inputs": [tensor], "outputs": [{"name": output["name"]} for output in signature["outputs"]]}
        for output in told(gateway.post(f"/v2/models/{endpoint}/infer", json=body))["outputs"]:
            print("V2", output["name"], output["datatype"], output["shape"], output["data"])


def told(answer: httpx.Response) -> dict:
    """The body of a good answer; a bad one is ``{"error": "one sentence"}``."""
    if answer.is_error:
        sys.exit(answer.json()["error"])
    return answer.json()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cancer")
