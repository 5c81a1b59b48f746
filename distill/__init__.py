"""From one recipe to an evaluated student.

    recipe.yaml --recipe--> problems --dedup, decontaminate--> prompts --teacher, verify--> traces
        --filtering, dedup, decontaminate, mixture--> dataset --chat, student--> student --eval--> report

`pipeline.py` is that line in code: read it first. What flows are the three records of `records.py`, in the tables of
`run_dir.py`. Nothing is imported here, so that `distill --help` answers at once.
"""
