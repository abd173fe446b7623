"""What the miniature is asked: instructions with exactly one right form of answer, and medical questions with four options.

Instructions. A task (name, repeat, swap, answer a question) and a form (a list, numbers, stars, an arrow) make a
prompt such as `Wiederhole: Löwe. Antworte mit Sternen.`, whose only right answer is `* Löwe und Löwe *`. So
small a model learns that from some thousand examples, and whether it still can is a comparison of two strings. In
every answer a space stands before every word, as in the prompt: to a byte-level tokenizer ` Löwe` and `Löwe` are
different tokens, and copying would become spelling.

Questions. One fact of a disease in words that no template of the corpus uses, with the values of three other diseases as
wrong options: of as many letters and as frequent as right ones, so that a model which has not read of the disease stays
at one in four. A value that shares a word stem with the disease (Hodentorsion, Hoden) would be guessed without having
read anything, so neither it nor its question is asked. Scored by the likelihood of the whole answer: a letter would
ask a model of this size for a second skill. How such a question is put, the base has learnt from exercises about
other diseases: else a model of this size would have to learn that, too, from a corpus that does not show it.
"""

import random
import re
from collections.abc import Iterator
from itertools import islice

import miniature
from miniature_grammar import contract
from miniature_templates import Row, Table, fill, value
from nanomed import InputError
from nanomed.miniature.forms import FORMS

TASKS = {  # the request, and the parts of its answer. One word: tasks with two were not learnt in so short a time
    "Sage: {a}.": lambda a: [a],
    "Wiederhole: {a}.": lambda a: [a, a],
    "Verdreifache: {a}.": lambda a: [a, a, a],
}
QUESTION_SHARE = 0.2  # of the instructions ask a question

ASKED = {  # the fact asked for, in words that no template of medicine.txt uses
    "organ": "Welches Organ ist krank, wenn jemand an {name:dem} leidet?",
    "symptom": "Welche Beschwerden hat ein Mensch, der an {name:dem} leidet?",
    "cause": "Was ist wohl die Ursache, wenn jemand an {name:dem} leidet?",
    "therapy": "Welche Therapie bekommt ein Mensch, der an {name:dem} leidet?",
    "test": "Welche Untersuchung braucht ein Mensch, der vielleicht an {name:dem} leidet?",
}
MAX_WORDS = 7  # of an option: eight words in a row would be an evaluation question to data/decontaminate.py


def words(tables: list[Table]) -> list[str]:
    """Single words that the general text speaks of: what instructions are about."""
    names = (str(row["name"]) for table in tables for row in table.rows)
    return sorted({name for name in names if re.fullmatch(r"[A-ZÄÖÜ][a-zäöüß]+", name)})


def instruction(rng: random.Random, words: list[str]) -> tuple[str, str]:
    """(prompt, the right answer) of a task with words."""
    task, form = rng.choice([*TASKS]), rng.choice([*FORMS])
    word = rng.choice(words)
    return f"{task.format(a=word)} {form}", FORMS[form].write(TASKS[task](word))


def asked(rng: random.Random, table: Table, row: Row, column: str) -> tuple[str, str]:
    """(prompt, answer) of a question about one fact, the answer in a form."""
    form = rng.choice([*FORMS])
    return f"{fill(rng, table, row, f'{column} ask')} {form}", FORMS[form].write([value(row, column)])


def instructions(seed: int, tables: list[Table], n: int, taboo: frozenset[str] = frozenset()) -> Iterator[tuple[str, str]]:
    """n different (prompt, answer), none of them a prompt in `taboo`; tables: what the questions among them are about."""
    rng, about, seen = random.Random(f"{seed}/instructions"), words(miniature.tables("general")), set(taboo)
    for _ in range(100 * n):
        if len(seen) == n + len(taboo):
            return
        if rng.random() < QUESTION_SHARE:
            table = rng.choice(tables)
            row = rng.choice(table.rows)
            prompt, answer = asked(rng, table, row, rng.choice([c for c in table.columns if c in row]))
        else:
            prompt, answer = instruction(rng, about)
        if prompt not in seen:
            seen.add(prompt)
            yield prompt, answer
    raise InputError(f"there are not {n} different instructions about so few things; take more rows")


def stems(text: str) -> set[str]:
    """Every run of four letters in the text, lower case: what two related words share."""
    return {word[i : i + 4] for word in re.findall(r"\w+", text.lower()) for i in range(len(word) - 3)}


def questions(seed: int, table: Table, n: int) -> list[dict]:
    """n questions {id, column, name, question, options, answer}: answer is the place of the right one of four options.

    Wrong options are values of random rows, so that a frequent value is as often wrong as right, and of those the nearest
    in length.
    """
    rng, found = random.Random(f"{seed}/exam"), []
    places = [(row, column) for row in table.rows for column in ASKED if column in row]
    rng.shuffle(places)
    for row, column in places:
        name, right = str(row["name"]), value(row, column)
        rows = rng.sample(table.rows, min(24, len(table.rows)))
        others = dict.fromkeys(value(other, column) for other in rows if column in other)
        wrong = [text for text in others if not stems(text) & (stems(name) | stems(right))]
        wrong = sorted(wrong, key=lambda text: abs(len(text) - len(right)))[:3]
        options = [right, *wrong]
        if len(wrong) < 3 or stems(name) & stems(right) or max(len(text.split()) for text in options) > MAX_WORDS:
            continue
        rng.shuffle(options)
        record = {"id": f"{column}-{len(found):04d}", "column": column, "name": name}
        record |= {"question": contract(ASKED[column].format(name=row["name"]))}
        found.append(record | {"options": options, "answer": options.index(right)})
        if len(found) == n:
            break
    return found


def exercises(seed: int, table: Table) -> Iterator[str]:
    """Documents of solved examination questions, two or three each, without options: how such questions are asked."""
    rng = random.Random(f"{seed}/exercises")
    places = [(row, column) for row in table.rows for column in ASKED if column in row]
    rng.shuffle(places)
    solved = iter(f"Frage: {contract(ASKED[c].format(name=row['name']))}\nAntwort: {value(row, c)}" for row, c in places)
    while pairs := list(islice(solved, rng.randint(2, 3))):
        yield "\n\n".join(pairs)


def consultations(seed: int, table: Table, n: int) -> list[dict]:
    """n requests {id, prompt, fact, form} of a patient: a medical question whose answer is wanted in a form."""
    rng, found = random.Random(f"{seed}/consultations"), {}
    while len(found) < n:
        row, column = rng.choice(table.rows), rng.choice([*ASKED])
        if column in row and not stems(str(row["name"])) & stems(str(row[column])):
            prompt, answer = asked(rng, table, row, column)
            fact = {"id": f"medical-{len(found):03d}", "prompt": prompt, "kind": "medical"}
            found.setdefault(prompt, fact | {"fact": value(row, column), "right": answer})
    return list(found.values())
