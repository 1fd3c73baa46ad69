"""The page in a real, headless Chromium: live values, search, order, a prompt's story, and Redis away and back.

`scripts/setup --tests` installs the browser. Without one these tests fail, unless SINGLESTREAM_TEST_NO_BROWSER is set.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from playwright.async_api import Page, async_playwright, expect

from services.value_store.routes_prompts import SCANNED_PER_PAGE
from singlestream.clients.value_store import AsyncValueStore, NewPrompt
from singlestream.embedded_redis import EmbeddedRedis
from singlestream.streams import Keys, connect
from tests.services.value_store.conftest import StoreProcess
from tests.services.value_store.world import World, until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif("SINGLESTREAM_TEST_NO_BROWSER" in os.environ, reason="SINGLESTREAM_TEST_NO_BROWSER is set"),
    pytest.mark.timeout(300),
]
SHOTS = Path("runs/screenshots/value_store")
expect.set_options(timeout=30_000)


@pytest.fixture
async def page() -> AsyncIterator[Page]:
    assert CHROMIUM, "no Chromium here: run `scripts/setup --tests`, or go without by SINGLESTREAM_TEST_NO_BROWSER=1"
    SHOTS.mkdir(parents=True, exist_ok=True)  # noqa: ASYNC240  before anything waits
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        one = await browser.new_page(viewport={"width": 1280, "height": 900})
        yield one
        await browser.close()


async def shoot(page: Page, name: str) -> None:
    await page.screenshot(path=SHOTS / f"{name}.png", full_page=True)


async def test_the_page_lives_with_the_run(page: Page, keys: Keys, tmp_path: Path) -> None:
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    with tempfile.TemporaryDirectory(prefix="ss-") as folder:
        server = EmbeddedRedis(Path(folder))
        server.start()
        store, redis = StoreProcess(tmp_path, keys, server.url), connect(server.url)
        try:
            store.start()
            world = World(redis, keys)
            async with AsyncValueStore(store.url) as client:
                prompts = [
                    NewPrompt(question=f"What is {i} + {i}?", answer=str(2 * i), source="sums") for i in range(60)
                ]
                ids = await client.upsert(prompts)
                await client.set_training("running")
            await page.goto(store.url)
            await expect(page.get_by_text("The learner has not reported yet.")).to_be_visible()
            await expect(page.locator("#prompts tbody tr")).to_have_count(25)
            await world.start()
            await world.publish(0)

            async def train(until_trained: int) -> None:
                async def turn() -> bool:
                    await world.report()
                    beat = {"step": 1, "state": "training", "waiting_for": None, "at_s": time.time()}
                    await redis.set(keys.learner, json.dumps(beat))
                    await world.play(lambda lease: float(int(lease.answer) % 4 == 0))
                    await world.train()
                    return (await world.ledger())["train"].ended["trained"] >= until_trained

                await until(turn, f"{until_trained} trained")

            await train(40)
            await expect(page.locator("#train-trained")).not_to_have_text("0")
            seen = int(await page.locator("#train-trained").inner_text())
            await world.publish(1)
            await train(seen + 40)
            await expect(page.locator("#train-trained")).not_to_have_text(str(seen))
            await expect(page.get_by_text("lineage 1")).to_be_visible()
            await expect(page.locator("rect.heat")).not_to_have_count(0)
            await shoot(page, "overview")
            await told_to_a_screen_reader(page)
            await order_and_search(page)
            await search_through_everything(page, store.url)
            await story(page, ids, redis, keys)
            await phone(page, "phone")
            server.stop()
            await expect(page.get_by_text("The value store waits for Redis").first).to_be_visible()
            await expect(page.locator("#overview")).to_be_visible()
            await shoot(page, "redis-away")
            server.start()
            await expect(page.get_by_text("The value store waits for Redis")).to_have_count(0)
            store.kill()
            await expect(page.locator("#trouble")).to_contain_text("The value store does not answer")
            await expect(page.locator("#overview")).to_be_visible()
            assert wrong == []
        finally:
            await redis.aclose()
            store.stop()
            server.stop()


async def told_to_a_screen_reader(page: Page) -> None:
    """The tree that Chromium hands to one: everything that acts, or shows in a way of its own, says what it is."""
    session = await page.context.new_cdp_session(page)
    tree = (await session.send("Accessibility.getFullAXTree"))["nodes"]
    told = [(one["role"]["value"], one.get("name", {}).get("value", "")) for one in tree if not one["ignored"]]
    named = ("button", "link", "searchbox", "combobox", "img", "image", "region", "navigation", "columnheader")
    assert [role for role, name in told if role in named and not name.strip()] == []
    roles = {role for role, _ in told}
    assert {"main", "heading", "button", "searchbox", "combobox", "region", "table", "navigation", "status"} <= roles
    assert ("columnheader", "weight") in told


async def order_and_search(page: Page) -> None:
    rows = page.locator("#prompts tbody tr")
    for name, column in (("weight", 2), ("v̂", 3)):
        await page.get_by_role("button", name=name).click()
        await expect(page.locator("th[aria-sort=descending]")).to_contain_text(name)

        async def ordered(column: int = column) -> bool:
            texts = await page.locator(f"#prompts tbody tr td:nth-child({column})").all_inner_texts()
            values = [float(text) for text in texts]
            return len(values) == 25 and values == sorted(values, reverse=True) and values[0] > 0.4

        await until(ordered, f"the rows by {name}")
    await page.get_by_role("button", name="Next").click()
    await expect(page.get_by_text("Page 2")).to_be_visible()
    box = page.get_by_role("searchbox")
    await box.fill("what is 7 +")
    await box.press("Enter")
    await expect(rows).to_have_count(1)
    await expect(rows.first).to_contain_text("What is 7 + 7?")


async def search_through_everything(page: Page, url: str) -> None:
    """A request looks through so many prompts; the one asked for was changed before all of these."""
    prompts = [
        NewPrompt(question=f"filler {i}", answer="", split="eval", source="filler") for i in range(SCANNED_PER_PAGE + 1)
    ]
    async with AsyncValueStore(url) as client:
        await client.upsert(prompts)
        newest = await client.list(q="What is 7 + 7?", order="updated", descending=True)
    assert newest.prompts == [] and newest.cursor, "one request does not come so far"
    await page.get_by_role("button", name="updated").click()
    await expect(page.locator("th[aria-sort=descending]")).to_contain_text("updated")
    box = page.get_by_role("searchbox")
    for text, found in (("what is 7 + 7", 1), ("nobody asked this", 0)):
        await box.fill(text)
        await box.press("Enter")
        await expect(page.locator("#prompts tbody tr")).to_have_count(found)
    await expect(page.get_by_text("No prompts match.")).to_be_visible()


async def story(page: Page, ids: list[str], redis: object, keys: Keys) -> None:
    visited = [one for one in ids if await redis.llen(keys.history(one)) > 0]  # type: ignore[attr-defined]
    await page.goto(page.url.split("#")[0] + f"#/prompt/{visited[0]}")
    await expect(page.locator("#history tbody tr")).not_to_have_count(0)
    await expect(page.get_by_text("Value over visits")).to_be_visible()
    told = page.locator("details.trajectory").first
    await told.locator("summary").first.click()
    await expect(told).to_contain_text("ended by stop")
    await expect(told).to_contain_text("Model, version")
    await expect(told).to_contain_text("The tokenizer is not beside the value store")
    await shoot(page, "story")
    await phone(page, "phone-story")
    link = page.get_by_role("link", name="All prompts")
    await link.focus()
    await page.keyboard.press("Enter")
    await expect(page.locator("#prompts tbody tr")).not_to_have_count(0)


async def phone(page: Page, name: str) -> None:
    await page.set_viewport_size({"width": 390, "height": 844})
    width = await page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390, f"the page is {width} px wide on a phone"
    await shoot(page, name)
    await page.set_viewport_size({"width": 1280, "height": 900})
