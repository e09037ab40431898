// The page: one or two conversations with served models, streamed, with the probabilities of every token.

const $ = (selector, root = document) => root.querySelector(selector);
const stored = (name, value) => {
  if (value !== undefined) localStorage.setItem(`landmark.${name}`, value);
  return localStorage.getItem(`landmark.${name}`);
};

let models = [];
let panes = [];

// ---- the API ---------------------------------------------------------------------------------------------------

async function call(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const key = sessionStorage.getItem("landmark.key");
  if (key) headers.Authorization = `Bearer ${key}`;
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) });
  if (answer.status === 401) {
    await askForKey();
    return call(path, body, signal);
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => null);
    throw new Error(told?.error?.message ?? `${answer.status} ${answer.statusText}`);
  }
  return answer;
}

function askForKey() {
  const dialog = $("#key-dialog");
  dialog.showModal();
  return new Promise((done) =>
    dialog.addEventListener("close", () => { sessionStorage.setItem("landmark.key", $("#key").value); done(); }, { once: true }));
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const piece = JSON.parse(data);
      if (piece.error) throw new Error(piece.error.message);
      yield piece;
    }
  }
}

// ---- a pane ----------------------------------------------------------------------------------------------------

class Pane {
  constructor(number) {
    this.number = number;
    this.element = $("#pane").content.firstElementChild.cloneNode(true);
    this.talk = $(".talk", this.element);
    this.speed = $(".speed", this.element);
    const select = $("select", this.element);
    for (const model of models) select.append(new Option(model.id));
    select.selectedIndex = Math.min(number, models.length - 1);
    this.restore();
    this.element.addEventListener("change", () => this.remember());
    this.reset();
  }

  fields() { return [...this.element.querySelectorAll("[name]")]; }
  value(name) { return $(`[name=${name}]`, this.element).value; }
  model() { return models.find((model) => model.id === this.value("model")); }

  remember() { stored(`pane${this.number}`, JSON.stringify(Object.fromEntries(this.fields().map((f) => [f.name, f.value])))); }

  restore() {
    let kept = {};
    try { kept = JSON.parse(stored(`pane${this.number}`) ?? "{}") ?? {}; } catch { /* as if nothing were kept */ }
    for (const field of this.fields()) {
      const known = field.name !== "model" || models.some((model) => model.id === kept.model);
      if (field.name in kept && known) field.value = kept[field.name];
    }
  }

  reset() {
    this.stop();
    this.messages = [];
    this.talk.replaceChildren(line("hint", "Say something. Hover over a word of the answer to see what else it could have been."));
    this.speed.value = "";
  }

  stop() { this.running?.abort(); }

  request() {
    const number = (name) => (this.value(name) === "" ? undefined : Number(this.value(name)));
    const shared = {
      model: this.value("model"), stream: true, stream_options: { include_usage: true }, temperature: number("temperature"),
      top_p: number("top_p"), top_k: number("top_k"), min_p: number("min_p"), seed: number("seed"),
      repetition_penalty: number("repetition_penalty"), max_tokens: number("max_tokens"), stop: this.value("stop") || undefined,
    };
    if (this.model().chat) {
      const system = this.value("system").trim();
      const messages = [...(system ? [{ role: "system", content: system }] : []), ...this.messages];
      return ["v1/chat/completions", { ...shared, messages, logprobs: true, top_logprobs: 5 }];
    }
    return ["v1/completions", { ...shared, prompt: this.messages.map((message) => message.content).join(""), logprobs: 5 }];
  }

  // Whether there was an answer: without one, what was said is not part of the conversation.
  async say(text) {
    const messages = this.messages;  // of this conversation, though a new one may begin meanwhile
    if (!messages.length) this.talk.replaceChildren();
    messages.push({ role: "user", content: text });
    const asked = line("user", text);
    this.talk.append(asked);
    const answer = line("assistant busy", "");
    this.talk.append(answer);
    this.talk.scrollTop = this.talk.scrollHeight;
    this.running = new AbortController();
    const began = performance.now();
    let said = "", first = 0, count = 0, pending = [], due = 0;
    const flush = () => {  // once a frame: where the talk ends is dear to ask
      cancelAnimationFrame(due);
      due = 0;
      const low = this.talk.scrollHeight - this.talk.scrollTop - this.talk.clientHeight < 60;
      answer.append(...pending.splice(0));
      if (low) this.talk.scrollTop = this.talk.scrollHeight;
      const seconds = (performance.now() - began) / 1000;  // all of them: a browser that was busy gets several at once
      if (count) this.speed.value = `${(count / seconds).toFixed(1)} tokens/s · first after ${Math.round(first - began)} ms`;
    };
    try {
      const response = await call(...this.request(), this.running.signal);
      for await (const piece of events(response)) {
        const choice = piece.choices[0];
        if (!choice) continue;
        const tokens = scored(choice);
        const content = choice.delta ? (choice.delta.content ?? "") : choice.text;
        if (tokens.length) { count += tokens.length; first ||= performance.now(); }
        said += content;
        if (content) pending.push(token(content, tokens));
        due ||= requestAnimationFrame(flush);
      }
    } catch (error) {
      if (error.name !== "AbortError") this.talk.append(line("error", error.message));
    } finally {
      flush();
      answer.classList.remove("busy");
      if (said) messages.push({ role: "assistant", content: said });
      else {
        messages.pop();
        asked.classList.add("unsent");
        answer.remove();
      }
      this.running = null;
    }
    return said !== "" || messages !== this.messages;
  }
}

function line(kind, text) {
  const element = document.createElement("div");
  element.className = kind;
  element.textContent = text;
  return element;
}

// What a chat says in logprobs.content, and a completion in parallel lists.
function scored(choice) {
  const logprobs = choice.logprobs;
  if (!logprobs) return [];
  if (logprobs.content) return logprobs.content.map((t) => ({ token: t.token, logprob: t.logprob, top: t.top_logprobs.map((o) => [o.token, o.logprob]) }));
  return logprobs.tokens.map((t, i) => ({ token: t, logprob: logprobs.token_logprobs[i], top: Object.entries(logprobs.top_logprobs[i] ?? {}) }));
}

function token(text, tokens) {
  const span = document.createElement("span");
  span.className = "token";
  span.textContent = text;
  const last = tokens.at(-1);
  if (last) {
    span.tokens = last;
    if (Math.exp(last.logprob) < 0.3) span.classList.add("unsure");
  }
  return span;
}

// ---- token probabilities on hover ------------------------------------------------------------------------------

const tip = $("#alternatives");

function showAlternatives(span) {
  const { token: chosen, logprob, top } = span.tokens;
  const options = top.some(([text]) => text === chosen) ? top : [...top, [chosen, logprob]];
  tip.replaceChildren(...options.sort((a, b) => b[1] - a[1]).map(([text, value]) => {
    const row = document.createElement("div");
    if (text === chosen) row.className = "chosen";
    const name = document.createElement("span"), bar = document.createElement("meter"), share = document.createElement("span");
    name.textContent = JSON.stringify(text).slice(1, -1).replaceAll(" ", "␣");
    bar.value = Math.exp(value);
    share.textContent = `${(100 * Math.exp(value)).toFixed(1)}%`;
    row.append(name, bar, share);
    return row;
  }));
  tip.hidden = false;
  const at = span.getBoundingClientRect(), size = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(at.left, innerWidth - size.width - 8))}px`;
  tip.style.top = `${at.bottom + size.height + 8 < innerHeight ? at.bottom + 4 : at.top - size.height - 4}px`;
}

for (const kind of ["pointerover", "click"]) {
  document.addEventListener(kind, (event) => {
    const span = event.target.closest?.(".token");
    if (span?.tokens) showAlternatives(span);
    else tip.hidden = true;
  });
}

// ---- engine figures --------------------------------------------------------------------------------------------

const trace = new Array(40).fill(0);
let before = null;

async function watch() {
  if (!document.hidden && panes.length) {
    try {
      const figures = (await (await call("stats")).json())[panes[0].value("model")];
      const now = performance.now();
      const show = (name, text) => { $(`[data-figure=${name}]`).textContent = text; };
      if (figures) {
        const model = panes[0].value("model");
        if (before?.model !== model) { before = null; trace.fill(0); }
        const speed = before ? Math.max(0, (figures.new_tokens - before.tokens) / ((now - before.at) / 1000)) : 0;
        before = { model, tokens: figures.new_tokens, at: now };
        show("speed", speed.toFixed(speed < 10 ? 1 : 0));
        show("running", figures.running);
        show("waiting", figures.waiting);
        show("used", `${Math.round(100 * figures.used)}%`);
        const read = figures.cached_tokens + figures.computed_tokens;
        show("cached", `${Math.round((100 * figures.cached_tokens) / Math.max(1, read))}%`);
        trace.push(speed);
        trace.shift();
        const most = Math.max(1, ...trace);
        $("#trace polyline").setAttribute("points", trace.map((v, i) => `${(i * 120) / 39},${23 - (22 * v) / most}`).join(" "));
      }
    } catch { /* the server is away; the next message says so */ }
  }
  setTimeout(watch, 1000);
}

// ---- controls --------------------------------------------------------------------------------------------------

const message = $("#message");

function setPanes(count) {
  while (panes.length > count) panes.pop().stop();
  while (panes.length < count) panes.push(new Pane(panes.length));
  $("#panes").replaceChildren(...panes.map((pane) => pane.element));
  $("#compare").setAttribute("aria-pressed", count === 2);
  stored("panes", count);
}

function fit() {
  message.style.height = "auto";
  message.style.height = `${message.scrollHeight + 2}px`;
}

function send() {
  const text = message.value;
  if (!text.trim() || !panes.length || panes.some((pane) => pane.running)) return;
  message.value = "";
  fit();
  for (const details of document.querySelectorAll("details[open]")) details.open = false;
  $("#send").textContent = "Stop";
  Promise.all(panes.map((pane) => pane.say(text))).then((answered) => {
    $("#send").textContent = "Send";
    if (!answered.some(Boolean) && !message.value) { message.value = text; fit(); }
    if ([document.body, $("#send"), message].includes(document.activeElement)) message.focus();
  });
}

const stop = () => panes.forEach((pane) => pane.stop());
const compare = () => setPanes(panes.length === 2 ? 1 : 2);
const anew = () => { panes.forEach((pane) => pane.reset()); message.focus(); };

function theme() {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark" ||
    (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = stored("theme", dark ? "light" : "dark");
}

$("#composer").addEventListener("submit", (event) => { event.preventDefault(); panes.some((pane) => pane.running) ? stop() : send(); });
$("#compare").addEventListener("click", compare);
$("#new").addEventListener("click", anew);
$("#theme").addEventListener("click", theme);
message.addEventListener("input", fit);
message.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
document.addEventListener("keydown", (event) => {
  const command = event.altKey && !event.ctrlKey && !event.metaKey && { KeyC: compare, KeyN: anew, KeyT: theme }[event.code];
  if (event.key === "Escape") { stop(); tip.hidden = true; }
  else if (command) { event.preventDefault(); command(); }
  else if (event.key === "/" && !event.target.matches("input, textarea, select")) { event.preventDefault(); message.focus(); }
});

if (stored("theme")) document.documentElement.dataset.theme = stored("theme");
try {
  const listed = await (await call("v1/models")).json();
  models = listed.data.filter((model) => "max_model_len" in model);
  setPanes(Number(stored("panes") ?? 1));
} catch (error) {
  $("#panes").replaceChildren(line("error", `${error.message}. Reload to try again.`));
}
watch();
