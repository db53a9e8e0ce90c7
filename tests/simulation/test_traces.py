import gzip
import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from lightning_easyscale.planning import Profile, published_profile
from lightning_easyscale.simulation.traces import (
    READERS,
    SHAPES,
    BadRow,
    RawJob,
    assign,
    d2_friendly,
    generate,
    read_easyscale,
    read_public,
)

PROFILE = published_profile()
CAPACITY = {"v100": 32, "p100": 16, "t4": 16}
HEAD = "name,time,application,max_parallelism,batch_size,epochs,enable_heterogeneous_deterministic,preferred_gpu\n"


def written(tmp_path, text, name="trace.csv"):
    path = tmp_path / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def test_published_form_is_read(tmp_path):
    trace = read_easyscale(written(tmp_path, HEAD + "a,5,resnet50,4,64,2,0,v100\nb,7,ncf,2,1024,1,1,t4\n"), PROFILE)
    a, b = trace.jobs
    assert (a.name, a.submit_s, a.max_ests, a.d2, a.preferred) == ("a", 5.0, 4, False, "v100")
    assert a.steps == 2 * 12800 / (64 * 4)
    assert (b.workload, b.d2) == ("neumf", True)
    assert trace.notes == []


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("a,x,bert,4,8,2,0,v100", "line 2: `time=x` is not a number"),
        ("a,-5,bert,4,8,2,0,v100", "line 2: `time=-5`"),
        ("a,5,gpt,4,8,2,0,v100", "line 2: `application=gpt`"),
        ("a,5,bert,0,8,2,0,v100", "line 2: `max_parallelism=0`"),
        ("a,5,bert,-4,8,2,0,v100", "line 2: `max_parallelism=-4`"),
        ("a,5,bert,1.5,8,2,0,v100", "line 2: `max_parallelism=1.5` is not a whole number"),
        ("a,5,bert,4,8,0,0,v100", "line 2: `epochs=0`"),
        ("a,5,bert,4,8,nan,0,v100", "line 2: `epochs=nan`"),
        ("a,5,bert,4,8,2,40,v100", "line 2: `enable_heterogeneous_deterministic=40` is not 0 or 1"),
        ("a,5,bert,4,8,2,0,k80", "line 2: `preferred_gpu=k80`"),
        (",5,bert,4,8,2,0,v100", "line 2: `name=` is not given"),
        ("a,5,bert,4,8,2,0", "line 2: 7 cells, the header has 8"),
        ("a,5,bert,4,8,2,0,v100,1", "line 2: 9 cells"),
        (
            "a,5,bert,4,8,2,0,v100\nb,5,bert,4,8,2,0,v100\na,6,bert,4,8,2,0,v100",
            "line 4: job name `a` was used in line 2",
        ),
    ],
)
def test_bad_rows_are_named_with_their_line(tmp_path, row, words):
    with pytest.raises(BadRow) as caught:
        read_easyscale(written(tmp_path, HEAD + row + "\n"), PROFILE)
    assert words in str(caught.value)
    assert "HINT" in str(caught.value)


def test_unknown_and_missing_columns_are_named(tmp_path):
    with pytest.raises(BadRow, match=r"line 1: unknown columns \['colour'\]"):
        read_easyscale(written(tmp_path, HEAD.strip() + ",colour\na,5,bert,4,8,2,0,v100,red\n"), PROFILE)
    with pytest.raises(BadRow, match="are missing"):
        read_easyscale(written(tmp_path, "name,time\na,5\n"), PROFILE)
    with pytest.raises(ValueError, match="no jobs"):
        read_easyscale(written(tmp_path, HEAD), PROFILE)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_easyscale(tmp_path / "absent.csv", PROFILE)


def test_duplicates_three_ways(tmp_path):
    path = written(tmp_path, HEAD + "a,5,bert,4,8,2,0,v100\nb,6,bert,4,8,2,0,v100\na,9,bert,8,8,2,0,v100\n")
    renamed = read_easyscale(path, PROFILE, duplicates="rename")
    assert [j.name for j in renamed.jobs] == ["a", "b", "a#2"]
    rows = "".join(f"{name},5,bert,4,8,2,0,v100\n" for name in ("a", "a", "a#2", "a", "a#2"))
    circle = read_easyscale(written(tmp_path, HEAD + rows, "circle.csv"), PROFILE, duplicates="rename")
    assert [j.name for j in circle.jobs] == ["a", "a#2", "a#2#2", "a#3", "a#2#3"]  # a new name may be there already
    last = read_easyscale(path, PROFILE, duplicates="last")
    assert [(j.name, j.submit_s, j.max_ests) for j in last.jobs] == [("a", 9.0, 8), ("b", 6.0, 4)]
    assert "1 rows" in last.notes[0]
    with pytest.raises(ValueError, match="duplicates='skip'"):
        read_easyscale(path, PROFILE, duplicates="skip")


def test_lenient_reading_notes_every_liberty(tmp_path):
    text = HEAD.strip() + ",extra\na,5,bert,4,8,2,40,v100,1\nb,5,bert,4,8,2,0,v100\nc,?,bert,4,8,2,0,v100,1\n"
    trace = read_easyscale(written(tmp_path, text), PROFILE, lenient=True)
    assert [(j.name, j.d2) for j in trace.jobs] == [("a", True), ("b", False)]
    assert len(trace.notes) == 4


SAMPLES = {
    "philly": "timestamp,duration,num_gpus,gpu_time,cluster\n"
    "2017-10-09 07:01:55,66.0,1,66.0,x\n2017-10-09 07:00:00,5,8,40,y\n",
    "elasticflow": "submission_time,duration,num_gpu,cluster\n1999,13423,1,07\n1900,100,8,07\n",
    "helios": "job_id,user,vc,gpu_num,cpu_num,node_num,state,submit_time,start_time,end_time,duration,queue\n"
    "1,u,v,1,4,1,COMPLETED,2020-04-01 00:01:40,2020-04-01 00:02:00,2020-04-01 00:03:00,60,20\n"
    "2,u,v,8,4,1,FAILED,2020-04-01 00:00:00,2020-04-01 00:00:00,2020-04-01 00:05:00,300,0\n"
    "3,u,v,0,4,1,COMPLETED,2020-04-01 00:00:00,2020-04-01 00:00:00,2020-04-01 00:05:00,300,0\n",
    "pai2020": "j1,worker,2,Terminated,1000.0,1600.0,600.0,29.0,50.0,V100\n"
    "j1,ps,1,Terminated,1000.0,1700.0,600.0,29.0,,\n"
    "j2,worker,4,Terminated,900.0,1000.0,600.0,29.0,200.0,T4\n",
    "pai2023": "name,cpu_milli,memory_mib,num_gpu,gpu_milli,gpu_spec,qos,pod_phase,"
    "creation_time,deletion_time,scheduled_time\n"
    "p1,12000,16384,1,1000,,LS,Running,100,700,160\np2,12000,16384,8,1000,,LS,Running,0,50,0\n"
    "p3,12000,16384,0,0,,LS,Running,0,50,0\n",
    "philly-json": json.dumps(
        [
            {
                "jobid": "a",
                "vc": "x",
                "submitted_time": "2017-10-09 07:01:40",
                "attempts": [
                    {
                        "start_time": "2017-10-09 07:02:00",
                        "end_time": "2017-10-09 07:03:00",
                        "detail": [{"ip": "m1", "gpus": ["gpu0"]}],
                    }
                ],
            },
            {
                "jobid": "b",
                "vc": "y",
                "submitted_time": "2017-10-09 07:00:00",
                "attempts": [
                    {
                        "start_time": "2017-10-09 07:00:00",
                        "end_time": "2017-10-09 07:05:00",
                        "detail": [{"ip": "m1", "gpus": [f"gpu{i}" for i in range(4)]}] * 2,
                    }
                ],
            },
            {"jobid": "c", "vc": "y", "submitted_time": "2017-10-09 07:00:00", "attempts": []},
        ]
    ),
}


@pytest.mark.parametrize("form", sorted(READERS))
def test_public_formats_are_read(tmp_path, form):
    jobs, _ = read_public(written(tmp_path, SAMPLES[form], "trace.csv.gz"), format=form)
    assert len(jobs) == 2
    assert jobs[0].submit_s == 0.0
    assert jobs[0].num_gpus == 8
    assert jobs[1].num_gpus == 1
    assert jobs[1].submit_s > 0
    assert all(j.duration_s > 0 for j in jobs)


def test_public_readers_name_bad_lines(tmp_path):
    path = written(tmp_path, SAMPLES["elasticflow"] + "2000,oops,1,07\n")
    with pytest.raises(BadRow, match="line 4: `duration=oops`"):
        read_public(path, format="elasticflow")
    jobs, notes = read_public(path, format="elasticflow", lenient=True)
    assert len(jobs) == 2
    assert "1 rows left out" in notes[0]
    with pytest.raises(ValueError, match="format='slurm'"):
        read_public(path, format="slurm")
    with pytest.raises(ValueError, match="no jobs left"):
        read_public(path, format="elasticflow", lenient=True, max_gpus=0)
    with pytest.raises(BadRow, match="not JSON"):
        read_public(path, format="philly-json")


@pytest.mark.parametrize(
    ("form", "row", "words"),
    [
        ("philly", "2017-10-09 07:01:55,66.0,1.5,66.0,x", "line 4: `num_gpus=1.5` is not a whole number"),
        ("philly", "noon,66.0,1,66.0,x", "line 4: `timestamp=noon` is not a time"),
        ("elasticflow", "2000,0,1,07", "line 4: `duration=0` is not above 0"),
        ("helios", "4,u,v,-1,4,1,COMPLETED,2020-04-01 00:00:00,,,60,0", "line 5: `gpu_num=-1`"),
        ("helios", "4,u,v,1,4,1,COMPLETED,yesterday,,,60,0", "line 5: `submit_time=yesterday`"),
        ("pai2020", "j3,worker,two,Terminated,1000.0,1600.0,600.0,29.0,50.0,V100", "line 4: `inst_num=two`"),
        ("pai2023", "p4,1,1,1,1000,,LS,Running,0,end,0", "line 5: `deletion_time=end`"),
        ("pai2023", "p4,1,1,1,1000,,LS,Running,0,90", "line 5: 10 cells, the header has 11"),
    ],
)
def test_every_public_reader_names_a_bad_line(tmp_path, form, row, words):
    path = written(tmp_path, SAMPLES[form] + row + "\n")
    with pytest.raises(BadRow) as caught:
        read_public(path, format=form)
    assert words in str(caught.value)
    assert "HINT" in str(caught.value)
    if "cells" not in words:
        jobs, notes = read_public(path, format=form, lenient=True)
        assert len(jobs) == 2
        assert words in "".join(notes)


@pytest.mark.parametrize("form", ["philly", "elasticflow", "helios", "pai2023"])
def test_every_public_table_names_an_unknown_and_a_missing_column(tmp_path, form):
    head, _, rest = SAMPLES[form].partition("\n")
    more = rest.replace("\n", ",1\n")
    with pytest.raises(BadRow, match=r"line 1: unknown columns \['colour'\]"):
        read_public(written(tmp_path, f"{head},colour\n{more}"), format=form)
    with pytest.raises(BadRow, match="line 1: columns .* are missing"):
        read_public(written(tmp_path, "colour\n1\n"), format=form)


def test_philly_json_names_job_and_line(tmp_path):
    log = json.loads(SAMPLES["philly-json"])
    log[1]["submitted_time"] = "noon"
    path = written(tmp_path, json.dumps(log, indent=1))
    line = 1 + next(i for i, text in enumerate(path.read_text().splitlines()) if '"b"' in text)
    with pytest.raises(BadRow, match=f"job `b`, line {line - 1}: `submitted_time=noon` is not a time"):
        read_public(path, format="philly-json")
    jobs, notes = read_public(path, format="philly-json", lenient=True)
    assert [j.name for j in jobs] == ["a"]
    assert "1 rows left out" in notes[0]
    log[1]["attempts"][0]["end_time"] = "never"
    with pytest.raises(BadRow, match="job `b`, line 1: `end_time=never`"):
        read_public(written(tmp_path, json.dumps(log)), format="philly-json")
    with pytest.raises(BadRow, match="line 3: `7` is not a job"):
        read_public(written(tmp_path, '[{"jobid": "a"},\n\n7]'), format="philly-json")


def test_shares_of_a_gpu_are_noted(tmp_path):
    text = SAMPLES["pai2023"].replace("p1,12000,16384,1,1000", "p1,12000,16384,1,460")
    assert any("1 pods" in note for note in read_public(written(tmp_path, text), format="pai2023")[1])
    assert read_public(written(tmp_path, SAMPLES["pai2023"]), format="pai2023")[1] == [
        "1 rows without GPU time left out"
    ]


def test_limit_and_size(tmp_path):
    jobs, notes = read_public(written(tmp_path, SAMPLES["philly"]), format="philly", max_gpus=4)
    assert [j.num_gpus for j in jobs] == [1]
    assert "more than 4 GPUs" in notes[0]


def test_assignment_keeps_durations_and_says_what_it_assumed():
    raw = [RawJob(f"j{i}", float(i), 100.0 + i, 1 + i % 16) for i in range(200)]
    specs, notes = assign(raw, PROFILE, CAPACITY, seed=3)
    again, _ = assign(raw, PROFILE, CAPACITY, seed=3)
    other, _ = assign(raw, PROFILE, CAPACITY, seed=4)
    assert specs == again != other
    assert "maxP assumed" in notes[0]
    for job, spec in zip(raw, specs, strict=True):
        kernels = "D2" if spec.d2 else "D1"
        seconds = PROFILE.seconds(spec.workload, spec.preferred, kernels, spec.batch_size)
        assert spec.steps * seconds == pytest.approx(job.duration_s)
        assert CAPACITY[spec.preferred] >= spec.max_ests
    with pytest.raises(ValueError, match="64 GPUs"):
        assign([RawJob("big", 0.0, 1.0, 64)], PROFILE, CAPACITY)


def test_a_profile_says_which_workloads_mix_types():
    assert d2_friendly(PROFILE) == {"bert", "electra", "neumf", "swin"}
    kept = Profile.load(Path(__file__).parents[2] / "recipes" / "results" / "scheduling_profile.json")
    assert d2_friendly(kept) == {"mnist_conv"}
    assert d2_friendly(replace(kept, measurements=[m for m in kept.measurements if m.kernels == "D1"])) == set()
    trace = generate(kept, CAPACITY, num_jobs=5)
    assert all(job.d2 for job in trace.jobs)


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_generator_matches_its_statistics(shape):
    capacity = {"v100": 128, "p100": 64, "t4": 64}
    trace = generate(PROFILE, capacity, shape=shape, num_jobs=4000, seed=1)
    statistics = SHAPES[shape]
    submits = [j.submit_s for j in trace.jobs]
    assert submits == sorted(submits)
    assert submits[-1] / 4000 == pytest.approx(statistics.gap_s, rel=0.1)
    durations = [
        j.steps * PROFILE.seconds(j.workload, j.preferred, "D2" if j.d2 else "D1", j.batch_size) for j in trace.jobs
    ]
    assert median(durations) == pytest.approx(statistics.median_s, rel=0.15)
    assert sum(durations) / 4000 == pytest.approx(statistics.mean_duration(), rel=0.25)
    share = sum(j.max_ests == max(statistics.sizes, key=statistics.sizes.get) for j in trace.jobs) / 4000
    assert share == pytest.approx(max(statistics.sizes.values()) / math.fsum(statistics.sizes.values()), abs=0.03)


def test_generator_is_a_function_of_its_seed_and_meets_its_load():
    first = generate(PROFILE, CAPACITY, num_jobs=50, seed=1)
    assert first == generate(PROFILE, CAPACITY, num_jobs=50, seed=1)
    assert first.jobs != generate(PROFILE, CAPACITY, num_jobs=50, seed=2).jobs
    trace = generate(PROFILE, CAPACITY, num_jobs=3000, load=0.8, seed=1)
    demand = sum(
        j.max_ests * j.steps * PROFILE.seconds(j.workload, j.preferred, "D2" if j.d2 else "D1", j.batch_size)
        for j in trace.jobs
    )
    assert demand / (trace.jobs[-1].submit_s * 64) == pytest.approx(0.8, rel=0.15)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"num_jobs": 0}, "num_jobs=0"), ({"load": -1.0}, "load=-1.0"), ({"shape": "borg"}, "shape='borg'")],
)
def test_generator_refuses_nonsense(options, words):
    with pytest.raises(ValueError, match=words):
        generate(PROFILE, CAPACITY, **options)


@pytest.mark.matrix
def test_full_public_traces_are_read(shared_data):
    for form, name, count in (
        ("philly", "philly_82247_jobs.csv.gz", 82_247),
        ("elasticflow", "elasticflow_69351_jobs.csv.gz", 69_351),
    ):
        jobs, _ = read_public(shared_data / "traces" / name, format=form)
        assert len(jobs) == count
