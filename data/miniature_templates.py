"""From a row of facts to documents: the eight forms a miniature document can take.

A table is a pair of text files in miniature_tables/. NAME.tsv has one thing a row and one fact a column, the first
column being the thing's name; a cell is a phrase (see miniature_grammar.py), `-` where there is no undisputed fact, or
plain text in the columns `PLAIN`. NAME.txt holds the German: sections of lines with placeholders, all optional:

    [capital]            sentences that state the fact; every form of document draws on them
    [capital plain]      the same for a leaflet, [capital note] for a letter; [capital head] a heading, [capital label]
                         the name of the fact, [capital ask] questions after it
    [capital both]       two rows that share the fact; [capital contrast] two that do not (the second row is other_...)
    [continent group]    titles of a list of all rows with one value
    [entry title] ...    what stands at the top of a form (`title`, `open`) and at its end (`end`)
    [anaphor]            columns or nouns that take the name up again in later sentences (`dieses Land`)
    [choice]             columns whose wrong answers in a multiple-choice question are surely wrong

A template is used only for a row that has all its facts, so that an empty cell is never spoken of.
"""

import random
import string
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from miniature_grammar import SPECS, Phrase, contract
from nanomed import InputError

FOLDER = Path(__file__).parent / "miniature_tables"
PLAIN = {"icd", "symbol", "number", "year", "habitat"}
MIN_CHARS, MAX_CHARS = 200, 3000
ANAPHORIC = set(SPECS) - {"ein", "einen", "einem", "eines"}  # forms in which `diese Krankheit` may stand for the name

Row = dict[str, Phrase | str]  # the facts of one thing, by column; an empty cell has no key


@dataclass(frozen=True)
class Template:
    """A line of NAME.txt, its placeholders' names, and the specs in which it uses `{name}`."""

    text: str
    fields: frozenset[str]
    name_specs: frozenset[str]

    @classmethod
    def parse(cls, text: str) -> "Template":
        used = [(field, spec) for _, field, spec, _ in string.Formatter().parse(text) if field]
        return cls(text, frozenset(f for f, _ in used), frozenset(s for f, s in used if f == "name"))


@dataclass(frozen=True)
class Table:
    """One kind of things: its rows and the German that speaks of them."""

    name: str
    columns: list[str]  # the facts, without `name`
    rows: list[Row]
    templates: dict[str, list[Template]]


def read_templates(path: Path) -> dict[str, list[Template]]:
    """The sections of a template file."""
    sections: dict[str, list[Template]] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            sections[section].append(Template.parse(line))
    return dict(sections)


def read_rows(path: Path) -> list[Row]:
    """The rows of a table; a malformed cell ends in an InputError that names its line."""
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    columns, rows = header.split("\t"), []
    for number, line in enumerate(lines, start=2):
        cells = line.split("\t")
        try:
            pairs = [(c, cell) for c, cell in zip(columns, cells, strict=True) if cell != "-"]
            rows.append({c: cell if c in PLAIN else Phrase(cell) for c, cell in pairs})
        except ValueError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
    return rows


def read_table(name: str, shared: str | None = None) -> Table:
    """NAME.tsv with NAME.txt; sections of `shared`.txt stand in where NAME.txt has none of that name."""
    templates = {
        **(read_templates(FOLDER / f"{shared}.txt") if shared else {}),
        **read_templates(FOLDER / f"{name}.txt"),
    }
    rows = read_rows(FOLDER / f"{name}.tsv")
    columns = (FOLDER / f"{name}.tsv").read_text(encoding="utf-8").split("\n", 1)[0].split("\t")[1:]
    return Table(name, columns, rows, templates)


class Pronoun(Phrase):
    """The name's stand-in at the head of a sentence: `Sie betrifft ...`. Verbs agree with the name."""

    def __init__(self, name: Phrase):
        super().__init__(name.cell)

    def declined(self, case: str = "nom", article: str | None = None) -> str:
        return self.pronoun


def find(table: Table, *sections: str) -> list[Template]:
    """The templates of the first of the sections that the table has."""
    return next((table.templates[s] for s in sections if s in table.templates), [])


def fill(rng: random.Random, table: Table, row: Row, *sections: str, again: bool = False) -> str:
    """A sentence about the row from the first section there is, or "" if no template fits.

    With `again`, the name was said before, and a pronoun or an anaphor may stand for it.
    """
    fitting = [t for t in find(table, *sections) if t.fields <= row.keys()]
    if not fitting:
        return ""
    template = rng.choice(fitting)
    if again:
        row = {**row, "name": subject(rng, table, row, template)}
    return contract(template.text.format(**row))


def subject(rng: random.Random, table: Table, row: Row, template: Template) -> Phrase:
    """What stands for the row's name in a later sentence: mostly the name itself, for the facts are to be learnt."""
    specs = {spec for spec in template.name_specs if "|" not in spec}
    draw = rng.random()
    if draw < 0.15 and template.text.startswith("{name:") and specs <= {"Der", "Nom"}:
        return Pronoun(row["name"])
    if 0.15 <= draw < 0.35 and {spec.lower() for spec in specs} <= ANAPHORIC:
        choice = rng.choice(table.templates["anaphor"]).text
        phrase = row.get(choice) if choice in table.columns else Phrase(choice)
        if phrase is not None and choice not in template.fields:
            return Phrase(f"dies~ {phrase.cell}")
    return row["name"]


def value(row: Row, column: str) -> str:
    """A fact by itself, with a capital: the answer to a question about it."""
    text = str(row[column])
    return text[0].upper() + text[1:]


def facts(rng: random.Random, table: Table, row: Row, n: int | None = None) -> list[str]:
    """The row's columns in a random order: n of them, or all."""
    columns = [c for c in table.columns if c in row]
    return rng.sample(columns, min(n or len(columns), len(columns)))


def prose(rng: random.Random, table: Table, row: Row, columns: list[str]) -> str:
    """Sentences that state the facts of the columns, as one to three paragraphs."""
    sentences = [fill(rng, table, row, column, again=i > 0) for i, column in enumerate(columns)]
    n_paragraphs = max(1, len(sentences) // rng.randint(3, 6))
    size = -(-len(sentences) // n_paragraphs)
    return "\n\n".join(" ".join(filter(None, sentences[i : i + size])) for i in range(0, len(sentences), size))


def entry(rng: random.Random, table: Table, row: Row) -> str:
    """An encyclopaedia's article: every fact there is."""
    return fill(rng, table, row, "entry title") + "\n\n" + prose(rng, table, row, facts(rng, table, row))


def brief(rng: random.Random, table: Table, row: Row) -> str:
    """A few facts, as on a flash card."""
    return fill(rng, table, row, "brief title") + "\n" + prose(rng, table, row, facts(rng, table, row, rng.randint(3, 4)))


def sheet(rng: random.Random, table: Table, row: Row) -> str:
    """Label and value, line by line, and a sentence or two."""
    lines = [f"{fill(rng, table, row, f'{c} label')}: {row[c]}" for c in table.columns if c in row]
    rest = prose(rng, table, row, facts(rng, table, row, rng.randint(1, 3)))
    return "\n".join([fill(rng, table, row, "sheet title"), *lines, "", rest])


def leaflet(rng: random.Random, table: Table, row: Row) -> str:
    """A patient's leaflet, or a pupil's: headings, and plain sentences under each."""
    blocks = [fill(rng, table, row, "leaflet title") + "\n\n" + fill(rng, table, row, "leaflet open")]
    for column in facts(rng, table, row, rng.randint(3, 7)):
        head = fill(rng, table, row, f"{column} head", f"{column} label")
        text = fill(rng, table, row, f"{column} plain", column)
        blocks.append(f"{head}\n{text}")
    return "\n\n".join([*blocks, fill(rng, table, row, "leaflet end")])


def note(rng: random.Random, table: Table, row: Row) -> str:
    """A letter: of a ward to a colleague, or of a child to its grandmother."""
    columns = facts(rng, table, row, rng.randint(4, 7))
    columns.sort(key=table.columns.index)  # a letter goes from the complaint to the therapy
    lines = [fill(rng, table, row, f"{column} note", column) for column in columns]
    opening = [fill(rng, table, row, f"note {part}") for part in ("title", "open")]
    return "\n".join([*opening, *lines, fill(rng, table, row, "note end")])


def quiz(rng: random.Random, table: Table, row: Row) -> str:
    """Questions with their answers, some of them multiple choice."""
    blocks = [fill(rng, table, row, "quiz title")]
    for number, column in enumerate(facts(rng, table, row, rng.randint(3, 6)), start=1):
        question = f"Frage {number}: {fill(rng, table, row, f'{column} ask')}"
        answer = f"Antwort: {value(row, column)}"
        if column in {t.text for t in find(table, "choice")} and rng.random() < 0.5:
            question, answer = choices(rng, table, row, column, question)
        elif rng.random() < 0.6:
            answer = f"Antwort: {fill(rng, table, row, column)}"
        blocks.append(f"{question}\n{answer}")
    return "\n\n".join(blocks)


def choices(rng: random.Random, table: Table, row: Row, column: str, question: str) -> tuple[str, str]:
    """The question with four options below it (fewer in a tiny table), and the line that says which is right."""
    wrong = sorted({value(other, column) for other in table.rows if column in other} - {value(row, column)})
    options = [value(row, column), *rng.sample(wrong, min(3, len(wrong)))]
    rng.shuffle(options)
    lines = [f"{letter}) {option}" for letter, option in zip("ABCD", options, strict=False)]
    return "\n".join([question, *lines]), f"Richtig ist {lines[options.index(value(row, column))]}"


def compare(rng: random.Random, table: Table, row: Row, other: Row) -> str:
    """Two rows side by side: what they share and where they differ; "" if that is less than two sentences."""
    both = {**row, **{f"other_{column}": fact for column, fact in other.items()}}
    sentences = []
    for column in facts(rng, table, row):
        if column in other:
            sentences.append(fill(rng, table, both, f"{column} {'both' if row[column] == other[column] else 'contrast'}"))
    head = fill(rng, table, both, "compare title") + "\n\n" + fill(rng, table, both, "compare open")
    sentences = list(filter(None, sentences))
    return head + "\n\n" + " ".join(sentences) if len(sentences) > 1 else ""


def gallery(rng: random.Random, table: Table, rows: list[Row]) -> str:
    """Several rows, a paragraph each."""
    names = ", ".join(f"{row['name']:nom}" for row in rows)
    title = rng.choice(find(table, "gallery title")).text.format(names=names)
    blocks = [" ".join(prose(rng, table, row, facts(rng, table, row, rng.randint(2, 5))).split("\n\n")) for row in rows]
    return "\n\n".join([title, *blocks])


def listing(rng: random.Random, table: Table, column: str, rows: list[Row]) -> str:
    """All rows with one value, as a list: `Krankheiten in der Kardiologie`."""
    lines = [fill(rng, table, row, "item") for row in rows]
    return fill(rng, table, rows[0], f"{column} group") + "\n\n" + "\n".join(f"- {line}" for line in lines)
