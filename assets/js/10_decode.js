// Arrays of a payload: base64 to typed arrays.
"use strict";

KVLens.decode = (packed) => {
  const raw = atob(packed.b);
  const bytes = new Uint8Array(raw.length);
  for (let index = 0; index < raw.length; index += 1) bytes[index] = raw.charCodeAt(index);
  if (packed.d === "u1") return bytes;
  return packed.d === "u4" ? new Uint32Array(bytes.buffer) : new Float32Array(bytes.buffer);
};

// A heatmap's cells as rows of numbers over `top`; cells that are still exact become null.
KVLens.decodeCells = (packed, top) => {
  const [rows, columns] = packed.s;
  const bytes = KVLens.decode(packed);
  const table = new Array(256);
  for (let code = 0; code < 255; code += 1) table[code] = (code / 254) * top;
  table[255] = null;
  const grid = [];
  for (let row = 0; row < rows; row += 1) {
    const line = new Array(columns);
    for (let column = 0; column < columns; column += 1) line[column] = table[bytes[row * columns + column]];
    grid.push(line);
  }
  return grid;
};
