"""WorldSearch-v0: questions like "boss of nim", answered by searching a made-up corpus and opening its pages.

People, firms and towns point at each other; each has a page. Levels: 0-1 one hop, then a hop more every second level
("town of head of firm of nim"); from level 5 on the first hop is backwards ("town of who has boss nim"). The corpus
grows from 15 pages to 200, and from level 3 on pages hold remarks that mention others. Names are drawn from 2,205 and
the world from the seed, so nothing can be memorised and no two seeds share a world.
"""

import random
import re
import sqlite3
from typing import ClassVar

from envs.base import AgentEnv, Oracle, call, say
from envs.library.shop_db import draw_name
from envs.task import Problem
from envs.tool import tool

RELATIONS = {
    "person": {"boss": "person", "firm": "firm", "town": "town"},
    "firm": {"head": "person", "town": "town"},
    "town": {"mayor": "person", "rival": "town"},
}
"""Kind of page -> {relation: kind of what it points at}."""
MAX_QUERY_WORDS = 6


class WorldSearch(AgentEnv):
    """Answer a question about a made-up world. Reward 1 iff the answer is exactly the name asked for."""

    inline: ClassVar[bool] = True
    max_turns = 30
    index: sqlite3.Connection | None = None

    def task(self, rng: random.Random, level: int) -> Problem:
        self.num_hits = 3 if level == 0 else 5
        self._draw_world(rng, level)
        while True:
            self._draw_question(rng, level)
            found = titles(self.search(f"boss {self.anchor}" if self.anchor else self.path[0]))
            if self.gold not in self.question and self.path[0] in found and len(found) > 1 and self._is_unique():
                return Problem(prompt=self.question, meta={"needs_tool": True, "hops": self.num_hops})

    def _draw_world(self, rng: random.Random, level: int) -> None:
        """Set `kinds` (name -> kind), `facts` (name -> relation -> name), `pages` (number -> title, text), `index`."""
        counts = {"person": 9 + 12 * level, "firm": 3 + 3 * level, "town": 3 + 4 * level}
        names: dict[str, None] = {}
        while len(names) < sum(counts.values()):
            names[draw_name(rng)] = None
        pool = iter(names)
        of_kind = {kind: [next(pool) for _ in range(count)] for kind, count in counts.items()}
        self.kinds = {name: kind for kind, members in of_kind.items() for name in members}
        self.facts = {
            name: {
                relation: rng.choice([other for other in of_kind[target] if other != name])
                for relation, target in RELATIONS[kind].items()
            }
            for name, kind in self.kinds.items()
        }
        shuffled = list(names)
        rng.shuffle(shuffled)
        remarks = {name: rng.sample(shuffled, max(0, level - 2) // 2) for name in shuffled}
        self.pages = {
            number: (name, self._page_text(rng, name, remarks[name])) for number, name in enumerate(shuffled, start=10)
        }
        self._drop_index()
        self.index = sqlite3.connect(":memory:", check_same_thread=False)
        self.index.execute("create virtual table pages using fts5(title, text)")
        rows = [(number, *page) for number, page in self.pages.items()]
        self.index.executemany("insert into pages(rowid, title, text) values(?,?,?)", rows)

    def _page_text(self, rng: random.Random, name: str, remarks: list[str]) -> str:
        facts = [f"{relation} {other}" for relation, other in self.facts[name].items()]
        if not remarks:
            return " ".join(facts)
        sentences = [f"{fact}." for fact in facts] + [f"{name} once wrote about {other}." for other in remarks]
        rng.shuffle(sentences)
        return " ".join(sentences)

    def _draw_question(self, rng: random.Random, level: int) -> None:
        """Set `path` (the pages to read in order), `relations` (what to look up on each), `anchor` (whom the first
        page names, where it is found backwards), `question` and `gold`."""
        self.num_hops = 1 + level // 2
        self.anchor = None
        name = rng.choice([n for n, kind in self.kinds.items() if kind == "person"])
        self.question = name
        if level >= 5:
            self.anchor = self.facts[name]["boss"]
            self.question = f"who has boss {self.anchor}"
        self.path, self.relations = [], []
        for _ in range(self.num_hops - (self.anchor is not None)):
            relation = rng.choice(list(self.facts[name]))
            self.path.append(name)
            self.relations.append(relation)
            self.question = f"{relation} of {self.question}"
            name = self.facts[name][relation]
        self.gold = name

    def _is_unique(self) -> bool:
        return self.anchor is None or sum(facts.get("boss") == self.anchor for facts in self.facts.values()) == 1

    @tool(inline=True)
    def search(self, query: str) -> str:
        """Find pages that hold all words of the query. Answers with title and number of each."""
        assert self.index is not None
        words = re.findall("[a-z0-9]+", query.lower())[:MAX_QUERY_WORDS]
        if not words:
            raise ValueError("empty query")
        hits = self.index.execute(
            "select rowid, title from pages where pages match ? order by bm25(pages, 9.0, 1.0), rowid limit ?",
            (" ".join(f'"{word}"' for word in words), self.num_hits),
        )
        # In order of their numbers: the best hit first would make reading the titles needless.
        return "\n".join(f"{title} {number}" for number, title in sorted(hits)) or "nothing found"

    @tool(inline=True)
    def open(self, page: int, fact: str = "") -> str:
        """Read the page with this number, or only one fact of it, such as boss."""
        if page not in self.pages:
            raise ValueError("no such page")
        title, text = self.pages[page]
        if fact and fact not in self.facts[title]:
            raise ValueError("no such fact")
        return self.facts[title][fact] if fact else text

    def reward(self, answer: str) -> dict[str, float]:
        return {"answer": float(answer.strip() == self.gold)}

    def hidden_state(self) -> str:
        return repr(self.pages)

    def close(self) -> None:
        self._drop_index()
        super().close()

    def _drop_index(self) -> None:
        if self.index is not None:
            self.index.close()
            self.index = None

    def oracle(self) -> Oracle:
        return self.research(random.Random(0), slip="")

    def noisy_oracle(self, rng: random.Random) -> Oracle:
        """40% right; on the last page 30% read another fact, 20% open another hit, 10% search for the relation."""
        choice = rng.random()
        return self.research(
            rng, slip="" if choice < 0.40 else "fact" if choice < 0.70 else "hit" if choice < 0.90 else "query"
        )

    def research(self, rng: random.Random, slip: str) -> Oracle:
        """Follow the path and say the last fact; `slip` is what goes wrong on the last page."""
        text = ""
        for index, (name, relation) in enumerate(zip(self.path, self.relations, strict=True)):
            here = slip if index == len(self.path) - 1 else ""
            query = f"boss {self.anchor}" if index == 0 and self.anchor else name
            replies = yield call("search", query=relation if here == "query" else query)
            numbers = titles(replies[0].text)
            wanted = [title for title in numbers if (title != name) == (here in ("hit", "query"))]
            title = rng.choice(wanted or list(numbers))
            facts = [fact for fact in self.facts[title] if fact != relation]
            fact = relation if here != "fact" and relation in self.facts[title] else rng.choice(facts)
            replies = yield call("open", page=numbers[title], fact=fact)
            text = replies[0].text
        yield say(text)


def titles(hits: str) -> dict[str, int]:
    """Title -> page number of a search result. Example: "nim 12" -> {"nim": 12}."""
    lines = [line.split() for line in hits.splitlines() if line[-1:].isdigit()]
    return {title: int(number) for title, number in lines}
