// A mask over a picture, one cell a token: painted by mouse, finger or keyboard.

const VEIL = "rgba(214, 40, 57, 0.62)";
const FRAME = "#ffffff";

export class Mask {
  constructor(canvas, status) {
    this.canvas = canvas;
    this.status = status;
    this.image = null;
    this.setGrid(8, 8);
    this.cursor = [0, 0];
    this.painting = null;
    canvas.addEventListener("pointerdown", (event) => this.begin(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", () => (this.painting = null));
    canvas.addEventListener("pointercancel", () => (this.painting = null));
    canvas.addEventListener("keydown", (event) => this.key(event));
    canvas.addEventListener("focus", () => this.show());
    canvas.addEventListener("blur", () => this.show());
  }

  setGrid(rows, columns) {
    if (rows === this.rows && columns === this.columns) return;
    this.rows = rows;
    this.columns = columns;
    this.cells = new Uint8Array(rows * columns);
    this.cursor = [0, 0];
    this.show();
  }

  setImage(image) {
    this.image = image;
    this.cells.fill(0);
    this.show();
  }

  clear() {
    this.cells.fill(0);
    this.show();
  }

  invert() {
    this.cells = this.cells.map((cell) => 1 - cell);
    this.show();
  }

  get painted() {
    return this.cells.reduce((sum, cell) => sum + cell, 0);
  }

  cellAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const row = Math.floor(((event.clientY - box.top) / box.height) * this.rows);
    const column = Math.floor(((event.clientX - box.left) / box.width) * this.columns);
    const inside = row >= 0 && row < this.rows && column >= 0 && column < this.columns;
    return inside ? [row, column] : null;
  }

  begin(event) {
    const cell = this.cellAt(event);
    if (!cell) return;
    this.canvas.setPointerCapture(event.pointerId);
    const index = cell[0] * this.columns + cell[1];
    this.painting = 1 - this.cells[index];
    this.paint(cell, this.painting);
  }

  move(event) {
    if (this.painting === null) return;
    const cell = this.cellAt(event);
    if (cell) this.paint(cell, this.painting);
  }

  paint([row, column], value) {
    this.cells[row * this.columns + column] = value;
    this.cursor = [row, column];
    this.show();
  }

  key(event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const [row, column] = this.cursor;
    if (event.key in steps) {
      const [down, right] = steps[event.key];
      this.cursor = [
        Math.min(Math.max(row + down, 0), this.rows - 1),
        Math.min(Math.max(column + right, 0), this.columns - 1),
      ];
      this.show(true);
    } else if (event.key === " ") {
      this.paint(this.cursor, 1 - this.cells[row * this.columns + column]);
    } else if (event.key === "Delete") {
      this.clear();
    } else {
      return;
    }
    event.preventDefault();
  }

  show(moved = false) {
    const { canvas, rows, columns } = this;
    const context = canvas.getContext("2d");
    const [width, height] = [canvas.width / columns, canvas.height / rows];
    context.imageSmoothingEnabled = false;
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (this.image) context.drawImage(this.image, 0, 0, canvas.width, canvas.height);
    context.fillStyle = VEIL;
    this.cells.forEach((cell, i) => {
      const [row, column] = [Math.floor(i / columns), i % columns];
      if (cell) context.fillRect(column * width, row * height, width, height);
    });
    const [row, column] = this.cursor;
    if (document.activeElement === canvas) {
      context.strokeStyle = FRAME;
      context.lineWidth = 3;
      context.strokeRect(column * width + 2, row * height + 2, width - 4, height - 4);
    }
    const state = this.cells[row * columns + column] ? "drawn again" : "kept";
    const place = moved ? `Row ${row + 1}, column ${column + 1}: ${state}. ` : "";
    this.status.textContent = `${place}${this.painted} of ${rows * columns} tokens are drawn again.`;
  }

  // A square PNG whose pixels are transparent where tokens are drawn again.
  png() {
    const side = this.rows === this.columns ? this.rows : this.rows * this.columns;
    const [width, height] = [side / this.columns, side / this.rows];
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = side;
    const context = canvas.getContext("2d");
    context.fillRect(0, 0, side, side);
    this.cells.forEach((cell, i) => {
      const [row, column] = [Math.floor(i / this.columns), i % this.columns];
      if (cell) context.clearRect(column * width, row * height, width, height);
    });
    return blobOf(canvas);
  }

  picture() {
    return blobOf(this.image);
  }
}

function blobOf(canvas) {
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

const LARGEST = 2048;

// The middle square of a picture file or address, as a canvas.
export async function middleSquare(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  const side = Math.min(image.naturalWidth, image.naturalHeight);
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = Math.min(side, LARGEST);
  const [left, top] = [(image.naturalWidth - side) >> 1, (image.naturalHeight - side) >> 1];
  canvas.getContext("2d").drawImage(image, left, top, side, side, 0, 0, canvas.width, canvas.width);
  return canvas;
}
