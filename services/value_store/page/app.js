// The page at "/": the run at a glance, the table of prompts, and one prompt's story.
import { html, render, useEffect, useState } from "/page/vendor/htm-preact-3.1.1.js";
import { getJson, giveToken } from "/page/api.js";
import { Overview } from "/page/overview.js";
import { Prompts } from "/page/prompts.js";
import { Story } from "/page/story.js";

function promptInAddress() {
  const found = location.hash.match(/^#\/prompt\/([0-9a-f]{16})$/);
  return found ? found[1] : null;
}

function TokenForm({ onDone }) {
  const submit = (event) => {
    event.preventDefault();
    giveToken(event.target.elements.token.value.trim());
    onDone();
  };
  return html`<form class="tools" onSubmit=${submit}>
    <label>Read token <input name="token" type="password" autocomplete="off" required /></label>
    <button type="submit">Show</button>
  </form>`;
}

function App() {
  const [prompt, setPrompt] = useState(promptInAddress());
  const [view, setView] = useState({ run: null, trouble: null, status: 200 });
  const [asked, setAsked] = useState(0);

  useEffect(() => {
    const moved = () => setPrompt(promptInAddress());
    addEventListener("hashchange", moved);
    return () => removeEventListener("hashchange", moved);
  }, []);

  useEffect(() => {
    let timer = null;
    let over = false;
    const ask = async () => {
      const reply = await getJson("/v1/overview");
      if (over) return;
      // What was last known stays on the page while the store is away.
      setView((was) => ({ run: reply.body ?? was.run, trouble: reply.trouble, status: reply.status }));
      timer = setTimeout(ask, 1000);
    };
    ask();
    return () => {
      over = true;
      clearTimeout(timer);
    };
  }, [asked]);

  const needsToken = view.status === 401 || view.status === 403;
  return html`<main>
    <header>
      <h1><a href="#/">Singlestream</a>${view.run ? ` · ${view.run.run}` : ""}</h1>
      <span class="soft">live, every second</span>
    </header>
    <div aria-live="polite">
      ${view.trouble && html`<p class="notice bad" id="trouble">${view.trouble}</p>`}
    </div>
    ${needsToken && html`<${TokenForm} onDone=${() => setAsked(asked + 1)} />`}
    ${view.run && html`<${Overview} run=${view.run} />`}
    ${prompt ? html`<${Story} id=${prompt} key=${prompt} />` : html`<${Prompts} />`}
  </main>`;
}

const root = document.getElementById("app");
root.textContent = "";
render(html`<${App} />`, root);
