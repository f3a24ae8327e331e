import { ApiError, draw, models, setToken } from "./api.js";
import * as history from "./history.js";
import { Mask, middleSquare } from "./mask.js";

const at = (id) => document.getElementById(id);
const mask = new Mask(at("mask"), at("mask-state"));
let known = [];
let stop = null;

async function connect() {
  try {
    known = await models();
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) return login();
    at("state").textContent = "The server does not answer; trying again…";
    return setTimeout(connect, 2000);
  }
  const chosen = at("model").value;
  at("model").replaceChildren(...known.map(({ id }) => new Option(id, id, false, id === chosen)));
  choose();
  const waiting = known.filter(({ state }) => state !== "ready");
  at("state").textContent = waiting.length
    ? waiting.map(({ id, state }) => `${id}: ${state}`).join(", ")
    : "Ready";
  if (waiting.length) setTimeout(connect, 1000);
}

function login() {
  at("state").textContent = "A token is needed";
  at("login").showModal();
}

function model() {
  return known.find(({ id }) => id === at("model").value);
}

function choose() {
  const { rows, columns, guidance, most_candidates: most } = model();
  at("n").max = most;
  if (!rows) return;
  mask.setGrid(rows, columns);
  at("guidance").disabled = !guidance;
  at("guidance-hint").textContent = guidance ? "1 = none" : "this model was not trained for it";
  if (!guidance) at("guidance").value = 1;
}

function fields() {
  const number = (id) => Number(at(id).value);
  const seed = at("seed").value;
  return {
    model: at("model").value,
    prompt: at("prompt").value,
    n: number("n"),
    temperature: number("temperature"),
    guidance: number("guidance"),
    stream: true,
    partial_images: model().rows,
    codes: true,
    ...(seed === "" ? {} : { seed: Number(seed) }),
  };
}

async function submit(event) {
  event.preventDefault();
  if (stop) return;
  at("problem").textContent = "";
  if (mask.image && !mask.painted) {
    at("problem").textContent = "Paint on the picture what is to be drawn again.";
    at("mask").focus();
    return;
  }
  stop = new AbortController();
  setRunning(true);
  const asked = fields();
  const cards = new Map();
  at("pictures").replaceChildren();
  at("warnings").replaceChildren();
  at("progress").textContent = "Waiting for the first row…";
  try {
    const files = mask.image ? [await mask.picture(), await mask.png()] : [];
    for await (const shown of draw(asked, files[0], files[1], stop.signal)) {
      if (shown.type === "error") throw new ApiError(503, shown.error.message);
      warn(shown.warnings);
      arrive(cards, asked, shown);
    }
    rank(cards);
  } catch (error) {
    if (error.name !== "AbortError") at("problem").textContent = error.message;
    at("progress").textContent = error.name === "AbortError" ? "Stopped." : "";
    if (error.status === 401) login();
  } finally {
    stop = null;
    setRunning(false);
  }
}

function warn(warnings) {
  if (at("warnings").children.length === warnings.length) return; // told once
  const items = warnings.map((text) => document.createElement("p"));
  items.forEach((item, i) => (item.textContent = warnings[i]));
  at("warnings").replaceChildren(...items);
}

function setRunning(running) {
  at("draw").disabled = running;
  at("stop").disabled = !running;
  at("results").setAttribute("aria-busy", String(running));
}

function arrive(cards, asked, shown) {
  if (!cards.has(shown.candidate)) {
    const card = document.createElement("li");
    card.dataset.candidate = shown.candidate;
    cards.set(shown.candidate, card);
    at("pictures").append(card);
  }
  const card = cards.get(shown.candidate);
  const finished = shown.type.endsWith(".completed");
  const address = `data:image/png;base64,${shown.b64_json}`;
  const entry = {
    prompt: asked.prompt,
    seed: shown.seed,
    candidate: shown.candidate,
    score: shown.score,
    model: shown.model,
    address,
  };
  card.setAttribute("aria-busy", String(!finished));
  card.dataset.rows = finished ? model().rows : shown.rows;
  card.replaceChildren(finished ? finishedFigure(entry) : figure(entry, "being drawn"));
  if (!finished) return;
  card.dataset.score = shown.score ?? 0;
  card.dataset.codes = shown.codes.join(" ");
  history.add(entry);
  showHistory();
  const done = [...cards.values()].filter((each) => each.getAttribute("aria-busy") === "false");
  at("progress").textContent = `${done.length} of ${asked.n} pictures, key ${shown.seed}`;
}

function rank(cards) {
  if (!model().ranked) return;
  const best = [...cards.values()].sort((a, b) => b.dataset.score - a.dataset.score);
  at("pictures").replaceChildren(...best);
  best.forEach((card, i) => {
    const rankText = `Rank ${i + 1}, score ${Number(card.dataset.score).toFixed(3)}`;
    card.querySelector("figcaption").textContent = rankText;
  });
  at("progress").textContent += ", best first";
}

function figure({ prompt, candidate, address }, caption) {
  const whole = document.createElement("figure");
  const image = new Image();
  image.src = address;
  image.alt = `${prompt}, picture ${candidate + 1}`;
  const text = document.createElement("figcaption");
  text.textContent = caption;
  whole.append(image, text);
  return whole;
}

function finishedFigure(entry, caption = `Picture ${entry.candidate + 1}`) {
  const whole = figure(entry, caption);
  const tools = document.createElement("div");
  tools.className = "tools";
  const download = document.createElement("a");
  download.href = entry.address;
  download.download = `tapir-${entry.seed}-${entry.candidate}.png`;
  download.textContent = "Download";
  const edit = document.createElement("button");
  edit.type = "button";
  edit.textContent = "Change";
  edit.addEventListener("click", () => change(entry.address, entry.prompt));
  for (const tool of [download, edit]) {
    tool.setAttribute("aria-label", `${tool.textContent} ${entry.prompt}, ${caption}`);
  }
  tools.append(download, edit);
  whole.append(tools);
  return whole;
}

async function change(address, prompt) {
  try {
    mask.setImage(await middleSquare(address));
  } catch {
    at("problem").textContent = "This file is not a picture that the browser can read.";
    return;
  }
  if (prompt) at("prompt").value = prompt;
  at("mask-area").hidden = at("no-image").hidden = false;
  at("mask").focus();
}

function removeImage() {
  mask.setImage(null);
  at("file").value = "";
  at("mask-area").hidden = at("no-image").hidden = true;
  at("file").focus();
}

function showHistory() {
  const items = history.entries().map((entry) => {
    const item = document.createElement("li");
    item.append(finishedFigure(entry, `${entry.prompt}, key ${entry.seed}`));
    return item;
  });
  at("history").replaceChildren(...items);
}

at("form").addEventListener("submit", submit);
at("stop").addEventListener("click", () => stop?.abort());
at("model").addEventListener("change", choose);
at("clear").addEventListener("click", () => mask.clear());
at("invert").addEventListener("click", () => mask.invert());
at("no-image").addEventListener("click", removeImage);
at("file").addEventListener("change", ({ target }) => {
  if (!target.files.length) return;
  const reader = new FileReader();
  reader.addEventListener("load", () => change(reader.result, ""));
  reader.readAsDataURL(target.files[0]);
});
at("forget").addEventListener("click", () => {
  history.forget();
  showHistory();
});
at("login").addEventListener("close", () => {
  setToken(at("token").value);
  connect();
});

showHistory();
connect();
