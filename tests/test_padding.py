import torch

from dynprune.slm.padding import left_padded


def test_all_sequences_end_in_the_last_column():
    batch = left_padded([(7, 8), (5,), (1, 2, 3)], 9, torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[9, 7, 8], [9, 9, 5], [1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [0, 0, 1], [1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 0, 1], [0, 0, 0], [0, 1, 2]]


def test_a_batch_can_be_wider_than_its_longest_sequence():
    assert left_padded([(7,)], 9, torch.device("cpu"), width=3)["input_ids"].tolist() == [[9, 9, 7]]
