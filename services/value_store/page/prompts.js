// The table of prompts: search, order, paging.
import { html, useEffect, useState } from "/page/vendor/htm-preact-3.1.1.js";
import { clock, getJson, number, whole } from "/page/api.js";

const COLUMNS = [
  ["weight", "weight"],
  ["value", "v̂"],
  ["n_eff", "n_eff"],
  ["visits", "visits"],
  ["updated", "updated"],
];
const PAGE = 25;

function pathOf({ q, order, descending, split }, cursor) {
  const query = new URLSearchParams({ order, descending, limit: PAGE });
  if (q) query.set("q", q);
  if (split) query.set("split", split);
  if (cursor) query.set("cursor", cursor);
  return `/v1/prompts?${query}`;
}

function Heading({ name, label, asked, onOrder }) {
  const sorted = asked.order === name ? (asked.descending ? "descending" : "ascending") : "none";
  const arrow = { ascending: " ▲", descending: " ▼", none: "" }[sorted];
  return html`<th scope="col" aria-sort=${sorted}><button onClick=${() => onOrder(name)}>${label}${arrow}</button></th>`;
}

function Row({ one }) {
  return html`<tr>
    <td><a href="#/prompt/${one.prompt_id}">${one.question.slice(0, 120)}</a> <span class="soft">${one.source}</span></td>
    <td>${number(one.weight)}</td>
    <td>${number(one.v_hat)}</td>
    <td>${number(one.n_eff, 1)}</td>
    <td>${whole(one.visits)}</td>
    <td>${clock(one.updated_at_s)}</td>
  </tr>`;
}

export function Prompts() {
  const [asked, setAsked] = useState({ q: "", order: "updated", descending: true, split: "" });
  const [cursors, setCursors] = useState([null]);
  const [page, setPage] = useState({ prompts: [], cursor: null });
  const [trouble, setTrouble] = useState(null);
  const cursor = cursors[cursors.length - 1];

  useEffect(() => {
    let over = false;
    const ask = async () => {
      const reply = await getJson(pathOf(asked, cursor));
      if (over) return;
      setTrouble(reply.trouble);
      if (!reply.body) return;
      setPage(reply.body);
      // A text search looks through so many prompts a request: go on until it finds one, or has seen all.
      if (reply.body.prompts.length === 0 && reply.body.cursor) setCursors([...cursors.slice(0, -1), reply.body.cursor]);
    };
    ask();
    const timer = setInterval(ask, 5000);
    return () => {
      over = true;
      clearInterval(timer);
    };
  }, [asked, cursor]);

  const change = (changes) => {
    setCursors([null]);
    setAsked({ ...asked, ...changes });
  };
  const order = (name) => change({ order: name, descending: asked.order === name ? !asked.descending : true });
  const search = (event) => {
    event.preventDefault();
    change({ q: event.target.elements.q.value.trim() });
  };
  return html`<section aria-label="Prompts">
    <h2>Prompts</h2>
    <form class="tools" role="search" onSubmit=${search}>
      <label>Search in questions <input name="q" type="search" /></label>
      <button type="submit">Search</button>
      <label>Split
        <select name="split" onChange=${(event) => change({ split: event.target.value })}>
          <option value="">all</option><option value="train">train</option><option value="eval">eval</option>
        </select>
      </label>
    </form>
    ${trouble && html`<p class="notice bad">${trouble}</p>`}
    <div class="scroll" tabindex="0" role="region" aria-label="Prompts and their values">
      <table id="prompts">
        <thead>
          <tr>
            <th scope="col">question</th>
            ${COLUMNS.map(([name, label]) => html`<${Heading} name=${name} label=${label} asked=${asked} onOrder=${order} />`)}
          </tr>
        </thead>
        <tbody>${page.prompts.map((one) => html`<${Row} key=${one.prompt_id} one=${one} />`)}</tbody>
      </table>
    </div>
    ${page.prompts.length === 0 && html`<p class="soft" role="status">${page.cursor ? "Searching…" : asked.q || asked.split ? "No prompts match." : "No prompts yet."}</p>`}
    <nav class="tools" aria-label="Pages">
      <button disabled=${cursors.length === 1} onClick=${() => setCursors(cursors.slice(0, -1))}>Previous</button>
      <span role="status">Page ${cursors.length}</span>
      <button disabled=${!page.cursor} onClick=${() => setCursors([...cursors, page.cursor])}>Next</button>
    </nav>
  </section>`;
}
