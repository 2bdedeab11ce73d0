// The page put together.

import * as form from "./form.js";
import { entry, jobCard } from "./gallery.js";
import { Editor } from "./mask.js";
import * as server from "./server.js";

const $ = (id) => document.getElementById(id);
const running = new Set(); // AbortControllers of the jobs of this tab
const editor = new Editor(complain);

function say(text) {
  $("state").textContent = text;
}

function complain(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

function update() {
  $("stop").disabled = running.size === 0;
  document.title = running.size ? `(${running.size}) gguf-sd` : "gguf-sd";
  say(running.size ? `${running.size} in work` : "Ready");
}

function paint() {
  complain("");
  const start = editor.read();
  const settings = { ...form.read(Boolean(start.image)), ...start };
  if (!start.mask) delete settings.mask_blur;
  const names = form.models();
  const gallery = entry(settings, { settings: useSettings, start: (blob) => editor.open(blob) });
  return Promise.all(names.map((name, place) => paintWith({ ...settings, model: name }, gallery, place))).then(() =>
    gallery.removeIfEmpty(),
  );
}

async function paintWith(settings, gallery, place) {
  const abort = new AbortController();
  const card = jobCard(settings, () => abort.abort());
  let began = 0; // when the first step was on its way
  running.add(abort);
  update();
  try {
    await server.paint(settings, abort.signal, (event) => {
      if (event.type === "state") card.show(event);
      if (event.type === "state" && event.state === "running") began ||= performance.now();
      if (event.type === "picture") {
        gallery.add(event, settings.model, ((performance.now() - began) / 1000).toFixed(1), place);
      }
      if (event.type === "end" && event.error) complain(event.error);
    });
  } catch (error) {
    if (error.name !== "AbortError") complain(error.message);
  } finally {
    running.delete(abort);
    card.remove();
    update();
  }
}

function cancelAll() {
  for (const abort of running) abort.abort();
}

async function useSettings(blob) {
  try {
    const note = form.fill(await server.settingsOf(blob));
    complain("");
    say(`The form has the picture's settings.${note}`);
    $("prompt").focus();
  } catch (error) {
    complain(error.message);
  }
}

function picturesOf(transfer) {
  return [...(transfer?.files ?? [])].filter((file) => file.type.startsWith("image/"));
}

function listen() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    paint();
  });
  $("stop").addEventListener("click", cancelAll);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
    if (event.key === "Escape" && !$("key-dialog").open) cancelAll();
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", $("drop").contains(event.target));
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    $("drop").classList.remove("over");
    const [file] = picturesOf(event.dataTransfer);
    if (!file) return;
    if ($("start").contains(event.target)) editor.open(file);
    else useSettings(file);
  });
  document.addEventListener("paste", (event) => {
    const [file] = picturesOf(event.clipboardData);
    if (file) editor.open(file);
  });
}

listen();
try {
  form.setUp(await server.facts());
  update();
} catch (error) {
  say("");
  complain(`the server does not answer: ${error.message}`);
}
