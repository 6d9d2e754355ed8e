"""The pages for readers: links lead somewhere, and the Chinese is set as Chinese is set."""

import re
from pathlib import Path

import pytest

from tests.helpers import ROOT, anchors, links

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
CHINESE = [page for page in PAGES if page.name.endswith(".zh.md")]


def of_page(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """Without code and without what a model wrote."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^    .*", "", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`\n]+`|「[^」]*」", "X", text)
    return re.sub(r"刚收到货,感觉(\*\*[^*]*\*\*)?", "X", text)


@pytest.mark.parametrize("page", PAGES, ids=of_page)
def test_links_lead_somewhere(page):
    for file, anchor in links(page):
        target = (page.parent / file).resolve() if file else page
        assert target.is_file(), file
        assert not anchor or anchor in anchors(target), f"{file}#{anchor}"


@pytest.mark.parametrize("page", CHINESE, ids=of_page)
def test_chinese_has_full_width_punctuation(page):
    half = r"[\u4e00-\u9fff][,;:?!()]|[,;:?!()][\u4e00-\u9fff]"
    found = re.findall(rf".{{0,12}}(?:{half}).{{0,12}}", re.sub(r"\]\([^)]*\)", "]", prose(page)))
    assert not found


TERMS = {  # what is written: what is not, for the same thing
    "提示词": "(?:条|取|个|编码|续写|模型、)提示(?!词)",
    "训练目录": "训练文件夹|运行文件夹|运行目录",
    "token": "词元",
    "理论上限": "极限",
    "模式坍塌": "坍缩|模式崩溃",
    "Hub": "模型库",
    "奖励作弊": "骗奖励|奖励黑客",
}


@pytest.mark.parametrize("page", CHINESE, ids=of_page)
@pytest.mark.parametrize("term", TERMS)
def test_one_thing_has_one_name(page, term):
    assert not re.findall(f".{{0,9}}(?:{TERMS[term]}).{{0,9}}", prose(page))


@pytest.mark.parametrize("page", CHINESE, ids=of_page)
def test_a_chinese_page_leads_to_chinese_ones_or_says_english(page):
    text = page.read_text(encoding="utf-8")
    for link in re.finditer(r"\]\(([^)\s#]+)\.md(#[^)]*)?\)", text):
        before, after = text[: link.start()].rsplit("\n", 1)[-1], text[link.end() :][:8]
        english = (page.parent / link[1]).with_suffix(".md")
        own = english.with_suffix(".zh.md") == page
        if "://" not in link[0] and not link[1].endswith(".zh") and "English" not in before and not own:
            assert not english.with_suffix(".zh.md").exists() and "英文" in after, link[0]


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_a_readme_is_read_to_its_end(page):
    assert len((ROOT / page).read_text(encoding="utf-8").splitlines()) <= 227
