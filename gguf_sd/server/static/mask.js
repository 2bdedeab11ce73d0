// The picture to start from, and the mask that is painted over it: by mouse, finger, pen or keyboard.

const $ = (id) => document.getElementById(id);
const TINT = "rgba(226, 87, 76, 0.55)";
const SIDE = 2048; // pixels of the longer side that are sent at most

export class Editor {
  constructor(tell) {
    this.tell = tell;
    this.picture = null; // a canvas; null where there is none
    this.mask = document.createElement("canvas"); // opaque where painted
    this.canvas = $("canvas");
    this.cursor = null; // of the keyboard, in pixels of the picture
    this.last = null;
    this.#listen();
  }

  async open(blob) {
    let image;
    try {
      image = await createImageBitmap(blob);
    } catch {
      this.tell("that is no picture which the browser can read");
      return;
    }
    const scale = Math.min(1, SIDE / Math.max(image.width, image.height));
    this.picture = document.createElement("canvas");
    for (const canvas of [this.picture, this.mask, this.canvas]) {
      canvas.width = Math.max(1, Math.round(image.width * scale));
      canvas.height = Math.max(1, Math.round(image.height * scale));
    }
    this.picture.getContext("2d").drawImage(image, 0, 0, this.picture.width, this.picture.height);
    this.cursor = null;
    $("brush").max = Math.max(this.picture.width, this.picture.height) / 2;
    $("brush").value = Math.max(this.picture.width, this.picture.height) / 8;
    $("editor").hidden = false;
    $("start").open = true;
    this.draw();
  }

  remove() {
    this.picture = null;
    $("editor").hidden = true;
    $("image").value = "";
  }

  // What the server gets: pictures as data URLs; the mask white where something shall change.
  read() {
    if (!this.picture) return {};
    const found = { image: this.picture.toDataURL("image/png") };
    if (this.#painted()) {
      const flat = document.createElement("canvas");
      flat.width = this.mask.width;
      flat.height = this.mask.height;
      const pen = flat.getContext("2d");
      pen.fillRect(0, 0, flat.width, flat.height);
      pen.drawImage(this.mask, 0, 0);
      found.mask = flat.toDataURL("image/png");
    }
    return found;
  }

  #painted() {
    const { data } = this.mask.getContext("2d").getImageData(0, 0, this.mask.width, this.mask.height);
    return data.some((value, i) => i % 4 === 3 && value > 127);
  }

  draw() {
    if (!this.picture) return;
    const pen = this.canvas.getContext("2d");
    pen.globalCompositeOperation = "source-over";
    pen.drawImage(this.mask, 0, 0);
    pen.clearRect(0, 0, this.canvas.width, this.canvas.height);
    pen.drawImage(this.mask, 0, 0);
    pen.globalCompositeOperation = "source-in";
    pen.fillStyle = TINT;
    pen.fillRect(0, 0, this.canvas.width, this.canvas.height);
    pen.globalCompositeOperation = "destination-over";
    pen.drawImage(this.picture, 0, 0);
    pen.globalCompositeOperation = "source-over";
    if (this.cursor) {
      pen.lineWidth = Math.max(1, this.canvas.width / 150);
      for (const [colour, width] of [["#000", 2], ["#fff", 1]]) {
        pen.strokeStyle = colour;
        pen.lineWidth = (width * this.canvas.width) / 250;
        pen.beginPath();
        pen.arc(this.cursor.x, this.cursor.y, this.size / 2, 0, 7);
        pen.stroke();
      }
    }
  }

  get size() {
    return Number($("brush").value);
  }

  stroke(from, to, erase = $("erase").checked) {
    const pen = this.mask.getContext("2d");
    pen.globalCompositeOperation = erase ? "destination-out" : "source-over";
    pen.strokeStyle = "#fff";
    pen.lineWidth = this.size;
    pen.lineCap = "round";
    pen.beginPath();
    pen.moveTo(from.x, from.y);
    pen.lineTo(to.x + 0.01, to.y);
    pen.stroke();
    pen.globalCompositeOperation = "source-over";
    this.draw();
  }

  clear() {
    this.mask.getContext("2d").clearRect(0, 0, this.mask.width, this.mask.height);
    this.draw();
  }

  invert() {
    const pen = this.mask.getContext("2d");
    pen.globalCompositeOperation = "source-out";
    pen.fillStyle = "#fff";
    pen.fillRect(0, 0, this.mask.width, this.mask.height);
    pen.globalCompositeOperation = "source-over";
    this.draw();
  }

  #listen() {
    const at = (event) => {
      const box = this.canvas.getBoundingClientRect();
      return {
        x: ((event.clientX - box.left) * this.canvas.width) / box.width,
        y: ((event.clientY - box.top) * this.canvas.height) / box.height,
      };
    };
    this.canvas.addEventListener("pointerdown", (event) => {
      this.canvas.setPointerCapture(event.pointerId);
      this.cursor = null;
      this.last = at(event);
      this.stroke(this.last, this.last);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      if (!this.last) return;
      const next = at(event);
      this.stroke(this.last, next);
      this.last = next;
    });
    for (const name of ["pointerup", "pointercancel"]) this.canvas.addEventListener(name, () => (this.last = null));
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
    $("clear").addEventListener("click", () => this.clear());
    $("invert").addEventListener("click", () => this.invert());
    $("remove").addEventListener("click", () => this.remove());
    $("image").addEventListener("change", (event) => event.target.files[0] && this.open(event.target.files[0]));
  }

  #key(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    this.cursor ??= { x: this.canvas.width / 2, y: this.canvas.height / 2 };
    const step = Math.max(1, this.size / 4);
    if (event.key in moves) {
      const [dx, dy] = moves[event.key];
      this.cursor = {
        x: Math.min(Math.max(this.cursor.x + dx * step, 0), this.canvas.width),
        y: Math.min(Math.max(this.cursor.y + dy * step, 0), this.canvas.height),
      };
    } else if (event.key === " ") this.stroke(this.cursor, this.cursor, false);
    else if (event.key.toLowerCase() === "x") this.stroke(this.cursor, this.cursor, true);
    else if (event.key === "+") $("brush").value = this.size * 1.25;
    else if (event.key === "-") $("brush").value = this.size / 1.25;
    else return;
    event.preventDefault();
    this.draw();
  }
}
