from tightrope.verify import Verdict, summarise


def verdicts(*statuses):
    return [Verdict(i, 7, 7, status, "ibp", 0.5, 0.001) for i, status in enumerate(statuses)]


MIXED = verdicts(*["robust"] * 5, "undecided", "undecided", "falsified", "misclassified", "misclassified")


def test_falsified_and_misclassified_both_count_against_attacked_accuracy():
    assert summarise(MIXED) == {
        "examples": 10,
        "clean_correct": 8,
        "robust": 5,
        "falsified": 1,
        "undecided": 2,
        "clean_accuracy": 0.8,
        "attacked_accuracy": 0.7,
        "certified_accuracy": 0.5,
    }


def test_without_an_attack_there_is_no_attacked_accuracy():
    found = summarise(MIXED, attacked=False)
    assert found["attacked_accuracy"] is None
    assert found["certified_accuracy"] == 0.5


def test_of_no_examples_nothing_is_claimed():
    assert summarise([])["certified_accuracy"] == 0.0
    assert summarise([])["examples"] == 0
