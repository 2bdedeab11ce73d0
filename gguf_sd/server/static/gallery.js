// Jobs while they are painted, and the pictures that came of them. Texts are set as texts, never as HTML.

import { megabytes, model } from "./form.js";

const $ = (id) => document.getElementById(id);
const MOST = 200; // entries that are kept

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export function seconds(value) {
  const whole = Math.max(1, Math.round(value));
  return whole < 90 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

// A card for a job: its look, how far it is, and how to end it.
export function jobCard(settings, cancel) {
  const look = make("img", { alt: "How the picture looks so far", hidden: true });
  const bar = make("progress", { max: 1, value: 0 });
  bar.setAttribute("aria-label", "Progress");
  const text = make("p", { className: "facts", textContent: "sent" });
  const button = make("button", { type: "button", textContent: "Cancel", onclick: cancel });
  const name = make("p", { className: "prompt", textContent: settings.prompt || "(no prompt)" });
  const card = make("article", { className: "job" }, make("div", {}, look), make("div", {}, name, bar, text, button));
  card.setAttribute("aria-label", `Painting: ${settings.prompt}`);
  $("jobs").append(card);
  return {
    show(event) {
      bar.value = event.progress;
      text.textContent = words(event, settings.model);
      if (event.look) {
        look.hidden = false;
        look.src = `data:image/jpeg;base64,${event.look}`;
      }
    },
    remove: () => card.remove(),
  };
}

function words(event, name) {
  if (event.state === "waiting") {
    const ahead = event.ahead ? `${event.ahead} ahead, ` : "";
    return `${name}: waiting, ${ahead}about ${seconds(event.seconds_left)} in all`;
  }
  return `${name}: step ${event.step} of ${event.steps}, about ${seconds(event.seconds_left)} left`;
}

// An entry of the gallery, for the pictures of one click on Paint; ``act`` is what their buttons do.
export function entry(settings, act) {
  const pictures = make("div", { className: "pictures" });
  const item = make(
    "li",
    { hidden: true },
    make("p", { className: "prompt", textContent: settings.prompt || "(no prompt)" }),
    make("p", { className: "facts", textContent: summary(settings) }),
    pictures,
  );
  $("gallery").prepend(item);
  while ($("gallery").children.length > MOST) $("gallery").lastElementChild.remove();
  return {
    // ``place``: where among the models that are compared.
    add(event, name, took, place) {
      const image = make("img", {
        src: `data:image/png;base64,${event.png}`,
        width: event.width,
        height: event.height,
        alt: settings.prompt || "a picture without a prompt",
      });
      image.style.height = "auto";
      const m = model(name);
      const facts = make("span", { textContent: ` ${m ? `${m.type}, ${megabytes(m)}, ` : ""}seed ${event.seed}, ${took} s` });
      const flag = event.flagged ? " (flagged by the safety checker)" : "";
      const link = make("a", { href: image.src, download: `gguf-sd-${name}-${event.seed}.png`, textContent: "Save" });
      const buttons = make(
        "div",
        { className: "actions" },
        link,
        make("button", { type: "button", textContent: "Use settings", onclick: () => act.settings(blob(event)) }),
        make("button", { type: "button", textContent: "Start from it", onclick: () => act.start(blob(event)) }),
      );
      const caption = make("figcaption", { title: event.parameters }, make("strong", { textContent: name }), facts, flag);
      caption.append(buttons);
      const figure = make("figure", {}, image, caption);
      figure.style.order = place;
      pictures.append(figure);
      item.hidden = false;
      $("empty").hidden = true;
    },
    removeIfEmpty() {
      if (!pictures.children.length) item.remove();
    },
  };
}

function summary(s) {
  const facts = [`${s.steps} steps`, `guidance ${s.guidance}`, s.sampler, s.schedule, `${s.width}×${s.height}`];
  if (s.negative_prompt) facts.push(`without ${s.negative_prompt}`);
  if (s.mask) facts.push("with a mask");
  else if (s.image) facts.push(`from a picture, strength ${s.strength}`);
  return facts.join(" · ");
}

function blob(event) {
  const bytes = Uint8Array.from(atob(event.png), (c) => c.charCodeAt(0));
  return new Blob([bytes], { type: "image/png" });
}
