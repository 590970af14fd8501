import pytest

from libs.runner.errors import first_sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Input X contains NaN.\nKNeighborsClassifier does not accept missing values.", "Input X contains NaN"),
        ("X has 2 features, but LDA is expecting 1.5 features as input.", "X has 2 features, but LDA is expecting 1.5 features as input"),
        ("Expected 2D array:\narray=[1. 2.].\nReshape your data.", "Expected 2D array: array=[1. 2.]"),
        ("division by zero", "division by zero"),
        ("", ""),
    ],
)
def test_the_first_sentence_stands_without_its_full_stop(text: str, sentence: str) -> None:
    assert first_sentence(ValueError(text)) == sentence
