// The page: one or two conversations with served models, streamed, with the probabilities of every token.

const $ = (selector, root = document) => root.querySelector(selector);
const stored = (name, value) => {
  if (value !== undefined) localStorage.setItem(`landmark.${name}`, value);
  return localStorage.getItem(`landmark.${name}`);
};

let models = [];
let panes = [];  // those that are shown
const made = [];  // and one that was closed: it keeps its conversation until a new one begins

// ---- the API ---------------------------------------------------------------------------------------------------

async function call(path, { body, signal, ask = true } = {}) {
  const headers = { "Content-Type": "application/json" };
  const key = sessionStorage.getItem("landmark.key");
  if (key) headers.Authorization = `Bearer ${key}`;
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) })
    .catch((error) => {
      if (error.name === "AbortError") throw error;
      away(true);
      throw new Away("The server cannot be reached");
    });
  away(false);
  if (answer.status === 401 && ask) {
    if (key !== sessionStorage.getItem("landmark.key") || (await askForKey(key !== null))) return call(path, { body, signal });
    throw new Error("This server wants an API key");
  }
  if (!answer.ok) {
    const told = await answer.json().catch(() => null);
    throw new Error(told?.error?.message ?? `${answer.status} ${answer.statusText}`);
  }
  return answer;
}

class Away extends Error {}

function away(is) { $("#away").textContent = is ? "The server is away" : ""; }

let asking = null;  // who else wants a key meanwhile waits for the same

// Whether one was given.
function askForKey(refused) {
  return (asking ??= new Promise((done) => {
    const dialog = $("#key-dialog");
    $("#refused").hidden = !refused;
    $("#key").value = dialog.returnValue = "";
    dialog.showModal();
    dialog.addEventListener("close", () => {
      asking = null;
      const given = dialog.returnValue === "use";
      if (given) sessionStorage.setItem("landmark.key", $("#key").value);
      done(given);
    }, { once: true });
  }));
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => (error.name === "AbortError" ? Promise.reject(error) : { done: true }));
    if (done) throw new Error("The answer broke off: the connection ended");
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.match(/^data: ?(.*)$/m)?.[1];
      if (data === "[DONE]") return;
      if (data === undefined) continue;  // a comment that keeps the connection alive
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
    this.element.addEventListener("change", () => { this.remember(); this.fitModel(); });
    this.reset();
    this.fitModel();
  }

  fields() { return [...this.element.querySelectorAll("[name]")]; }
  value(name) { return $(`[name=${name}]`, this.element).value; }
  model() { return models.find((model) => model.id === this.value("model")); }

  remember() { stored(`pane${this.number}`, JSON.stringify(Object.fromEntries(this.fields().map((f) => [f.name, f.value])))); }

  restore() {
    let kept = null;
    try { kept = JSON.parse(stored(`pane${this.number}`)); } catch { /* as if nothing were kept */ }
    if (typeof kept !== "object" || !kept) return;
    for (const field of this.fields()) {
      const known = field.name !== "model" || models.some((model) => model.id === kept.model);
      if (typeof kept[field.name] === "string" && known) field.value = kept[field.name];
    }
  }

  fitModel() {
    const system = $("[name=system]", this.element);
    system.disabled = !this.model().chat;
    system.placeholder = system.disabled ? "This model has no chat template, which would say where it goes" : "";
  }

  // Whether all settings can be sent; the first that cannot is shown, with the reason.
  valid() {
    const wrong = this.fields().find((field) => !field.checkValidity());
    if (wrong) { $(".bar details", this.element).open = true; wrong.reportValidity(); }
    return !wrong;
  }

  // Begins with what another has said so far, but for what it is about to say.
  follow(other) {
    const running = Boolean(other.running);
    this.messages = other.messages.slice(0, running ? -1 : undefined);
    const lines = [...other.talk.children].filter((each) => !(running && other.current.includes(each)));
    if (!this.messages.length) return;
    this.talk.replaceChildren(...lines.map((each) => each.cloneNode(true)));
    const [theirs, mine] = [lines.flatMap(tokensOf), [...this.talk.children].flatMap(tokensOf)];
    mine.forEach((span, i) => { span.tokens = theirs[i].tokens; });
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
      repetition_penalty: number("repetition_penalty"), max_tokens: number("max_tokens"), stop: stops(this.value("stop")),
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
    const asked = line("user", text), answer = line("assistant busy", "");
    let thoughts = null;
    this.current = [asked, answer];
    this.talk.append(asked, answer);
    this.talk.scrollTop = this.talk.scrollHeight;
    const running = (this.running = new AbortController());
    const began = performance.now();
    let said = "", first = 0, count = 0, pending = [], thought = "", due = 0, finish = null;
    const flush = () => {  // once a frame: where the talk ends is dear to ask
      cancelAnimationFrame(due);
      due = 0;
      const low = this.talk.scrollHeight - this.talk.scrollTop - this.talk.clientHeight < 60;
      if (thought) {
        if (!thoughts) { thoughts = thinking(); this.current.push(thoughts); answer.before(thoughts); }
        thoughts.append(thought);
        thought = "";
      }
      answer.append(...pending.splice(0));
      if (low) this.talk.scrollTop = this.talk.scrollHeight;
      const seconds = (performance.now() - began) / 1000;  // all of them: a browser that was busy gets several at once
      if (count) this.speed.value = `${(count / seconds).toFixed(1)} tokens/s · first after ${Math.round(first - began)} ms`;
    };
    const note = (kind, text) => answer.after(line(kind, text));
    try {
      const [path, body] = this.request();
      const response = await call(path, { body, signal: running.signal });
      for await (const piece of events(response)) {
        const choice = piece.choices[0];
        if (!choice) continue;
        const tokens = scored(choice);
        const content = choice.delta ? (choice.delta.content ?? "") : choice.text;
        if (tokens.length) { count += tokens.length; first ||= performance.now(); }
        finish = choice.finish_reason ?? finish;
        thought += choice.delta?.reasoning_content ?? "";
        said += content;
        if (content) pending.push(token(content, tokens, !said.slice(content.length)));
        due ||= requestAnimationFrame(flush);
      }
      if (finish === "length") note("note", "Cut off here: no longer answer was allowed.");
    } catch (error) {
      if (error.name !== "AbortError") note("error", error.message);
    } finally {
      flush();
      answer.classList.remove("busy");
      if (said || thoughts) messages.push({ role: "assistant", content: said });
      else {
        messages.pop();
        asked.classList.add("unsent");
        answer.remove();
      }
      if (this.running === running) this.running = null;
    }
    return said !== "" || thoughts !== null || messages !== this.messages;
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

function thinking() {
  const details = document.createElement("details");
  details.className = "thoughts";
  details.append(document.createElement("summary"));
  details.firstChild.textContent = "Thoughts";
  return details;
}

// One text a line; a line break in it is written \n.
function stops(text) {
  const given = text.split("\n").filter(Boolean).map((each) => each.replace(/\\([nt\\])/g, (_, c) => ({ n: "\n", t: "\t" })[c] ?? c));
  return given.length ? given : undefined;
}

const tokensOf = (element) => [...element.querySelectorAll(".token")];

// `first`: by which Tab reaches the answer's tokens; arrow keys go on from there.
function token(text, tokens, first) {
  const span = document.createElement("span");
  span.className = "token";
  span.tabIndex = first ? 0 : -1;
  span.setAttribute("aria-describedby", "alternatives");
  span.textContent = text;
  const last = tokens.at(-1);
  if (last) {
    span.tokens = last;
    if (Math.exp(last.logprob) < 0.3) span.classList.add("unsure");
  }
  return span;
}

// ---- token probabilities: on hover, and by keyboard ------------------------------------------------------------------------------

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
    bar.setAttribute("aria-label", `probability of ${name.textContent}`);
    share.textContent = `${(100 * Math.exp(value)).toFixed(1)}%`;
    row.append(name, bar, share);
    return row;
  }));
  tip.hidden = false;
  const at = span.getBoundingClientRect(), size = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(at.left, innerWidth - size.width - 8))}px`;
  tip.style.top = `${at.bottom + size.height + 8 < innerHeight ? at.bottom + 4 : at.top - size.height - 4}px`;
}

for (const kind of ["pointerover", "click", "focusin"]) {
  document.addEventListener(kind, (event) => {
    const span = event.target.closest?.(".token");
    if (span?.tokens) showAlternatives(span);
    else tip.hidden = true;
  });
}

function walk(event) {
  const all = tokensOf(event.target.parentElement), at = all.indexOf(event.target);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
  if (to === undefined || !all[to]) return;
  event.preventDefault();
  event.target.tabIndex = -1;
  all[to].tabIndex = 0;
  all[to].focus();
}

// ---- engine figures --------------------------------------------------------------------------------------------

const trace = new Array(40).fill(0);
let before = null;

async function watch() {
  if (!document.hidden && panes.length) {
    try {
      const figures = (await (await call("stats", { ask: false })).json())[panes[0].value("model")];
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
    } catch { /* it is away, which is said already, or wants a key */ }
  }
  setTimeout(watch, 1000);
}

// ---- controls --------------------------------------------------------------------------------------------------

const message = $("#message");

function setPanes(count) {
  for (const pane of made.slice(count)) pane.stop();
  while (made.length < count) made.push(new Pane(made.length));
  panes = made.slice(0, count);
  if (count === 2 && !panes[1].messages.length) panes[1].follow(panes[0]);
  $("#panes").replaceChildren(...panes.map((pane) => pane.element));
  for (const pane of panes) pane.talk.scrollTop = pane.talk.scrollHeight;
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
  if (!panes.every((pane) => pane.valid())) return;
  message.value = "";
  fit();
  settings().forEach((details) => { details.open = false; });
  $("#send").textContent = "Stop";
  Promise.all(panes.map((pane) => pane.say(text))).then((answered) => {
    $("#send").textContent = "Send";
    if (!answered.some(Boolean) && !message.value) { message.value = text; fit(); }
    if ([document.body, $("#send"), message].includes(document.activeElement)) message.focus();
  });
}

const settings = () => [...document.querySelectorAll(".bar details[open]")];
const stop = () => panes.forEach((pane) => pane.stop());
const compare = () => panes.length && setPanes(panes.length === 2 ? 1 : 2);
const anew = () => { made.forEach((pane) => pane.reset()); message.focus(); };

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
document.addEventListener("pointerdown", (event) => {
  for (const details of settings()) if (!details.contains(event.target)) details.open = false;
});
document.addEventListener("keydown", (event) => {
  if ($("#key-dialog").open) return;
  const command = event.altKey && !event.ctrlKey && !event.metaKey && { KeyC: compare, KeyN: anew, KeyT: theme }[event.code];
  if (event.key === "Escape") {
    const [open] = settings();
    if (open) { open.open = false; $("summary", open).focus(); }
    else if (tip.hidden || panes.some((pane) => pane.running)) stop();
    tip.hidden = true;
  } else if (command) { event.preventDefault(); command(); }
  else if (event.target.matches(".token")) walk(event);
  else if (event.key === "/" && !event.target.matches("input, textarea, select")) { event.preventDefault(); message.focus(); }
});

async function start() {
  try {
    const listed = await (await call("v1/models")).json();
    models = listed.data.filter((model) => "max_model_len" in model);
    if (!models.length) throw new Error("This server has no model that talks");
    setPanes(stored("panes") === "2" ? 2 : 1);
  } catch (error) {
    const again = document.createElement("button"), told = line("error", `${error.message}. `);
    again.textContent = "Try again";
    again.addEventListener("click", start);
    told.append(again);
    $("#panes").replaceChildren(told);
    if (error instanceof Away) setTimeout(() => again.isConnected && start(), 2000);
  }
}

if (["light", "dark"].includes(stored("theme"))) document.documentElement.dataset.theme = stored("theme");
start();
watch();
