"""Train a model as anybody would, and write what ``millrace models upload`` wants: the model and an example request.

    python examples/train_cancer.py [DIRECTORY]        writes cancer.joblib and example.json

The data are the 569 tumours of scikit-learn's breast cancer set, 30 features each; 0 is malignant, 1 benign.
"""

import json
import sys
from pathlib import Path

import joblib
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def main(directory: Path) -> None:
    """Train, test, write."""
    data = load_breast_cancer()
    train_x, test_x, train_y, test_y = train_test_split(data.data, data.target, test_size=0.2, stratify=data.target, random_state=0)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1_000)).fit(train_x, train_y)
    print(f"{model.score(test_x, test_y):.1%} right on {len(test_x)} samples it has not seen")

    directory.mkdir(parents=True, exist_ok=True)
    joblib.dump(model, directory / "cancer.joblib")
    (directory / "example.json").write_text(json.dumps({"instances": test_x[:2].tolist()}))
    print(f"wrote {directory / 'cancer.joblib'} and {directory / 'example.json'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
