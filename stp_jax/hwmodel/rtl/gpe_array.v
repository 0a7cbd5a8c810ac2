// Input-stationary systolic array of ROWS x COLUMNS group processing elements.
//
// Activations are loaded down the columns, all columns at once (GROUP activations a column and
// cycle); terms stream across the columns, one cycle of skew a column; partial sums move down the
// rows, one cycle of skew a row. For one fold, T filters of k slots each, counted from cycle 0:
//
//   cycle                      what happens
//   0 .. R-1                   the edge drives row R-1's activations, then R-2's, ... row 0's last
//   R + r                      row r meets the first slot of filter 0 at its column 0
//   R + r + c + t*k + s        element (r, c) adds slot s of filter t
//   R + r + c + t*k + k-1      ... and with it the partial sum of filter t from row r-1, which
//                              that row registered at the end of the cycle before: no waiting
//   R + (R-1) + (C-1) + T*k-1  the bottom right element completes the last filter
//
// so a fold takes 2R + C + T*k - 2 cycles, and the next may load in the cycle that follows. Only
// `last_in` says where a filter's slots end: k may differ from filter to filter, all rows alike, and
// a fold then takes the sum of the filters' k in place of T*k. The
// bottom row's sums are registered then; storing them overlaps the next fold's first cycle.
// Row 0 takes `psum_in`: zero, or what earlier folds along the reduction left in the output buffer.
module gpe_array #(
    parameter ROWS = 4,
    parameter COLUMNS = 4,
    parameter GROUP = 8,
    parameter WIDTH = 8,
    parameter PSUM = 32,
    parameter INDEX = $clog2(GROUP),
    parameter EXPONENT = $clog2(WIDTH)
) (
    input                             clock,
    input                             reset,
    input                             load,
    input  [COLUMNS*GROUP*WIDTH-1:0]  activations_in,
    input  [ROWS-1:0]                 valid_in,  // row r's term at column 0, skewed by the edge
    input  [ROWS-1:0]                 sign_in,
    input  [ROWS*EXPONENT-1:0]        exponent_in,
    input  [ROWS*INDEX-1:0]           index_in,
    input  [ROWS-1:0]                 last_in,
    input  [COLUMNS*PSUM-1:0]         psum_in,
    output [COLUMNS-1:0]              psum_take,  // row 0 adds psum_in in this cycle
    output [COLUMNS-1:0]              psum_done,  // the bottom row's sum is in psum after this cycle
    output [COLUMNS*PSUM-1:0]         psum
);
    localparam RESIDENT = GROUP * WIDTH;

    // Wires between elements: row-to-row ones have ROWS+1 levels, column-to-column COLUMNS+1.
    wire [RESIDENT-1:0] down [0:(ROWS+1)*COLUMNS-1];
    wire [PSUM-1:0]     sums [0:(ROWS+1)*COLUMNS-1];
    wire                valid    [0:ROWS*(COLUMNS+1)-1];
    wire                sign     [0:ROWS*(COLUMNS+1)-1];
    wire                last     [0:ROWS*(COLUMNS+1)-1];
    wire [EXPONENT-1:0] exponent [0:ROWS*(COLUMNS+1)-1];
    wire [INDEX-1:0]    index    [0:ROWS*(COLUMNS+1)-1];

    genvar r, c;
    generate
        for (c = 0; c < COLUMNS; c = c + 1) begin : column_edge
            assign down[c] = activations_in[c*RESIDENT +: RESIDENT];
            assign sums[c] = psum_in[c*PSUM +: PSUM];
            assign psum_take[c] = last[c];
            assign psum_done[c] = last[(ROWS-1)*(COLUMNS+1) + c];
            assign psum[c*PSUM +: PSUM] = sums[ROWS*COLUMNS + c];
        end
        for (r = 0; r < ROWS; r = r + 1) begin : row
            assign valid[r*(COLUMNS+1)]    = valid_in[r];
            assign sign[r*(COLUMNS+1)]     = sign_in[r];
            assign last[r*(COLUMNS+1)]     = last_in[r];
            assign exponent[r*(COLUMNS+1)] = exponent_in[r*EXPONENT +: EXPONENT];
            assign index[r*(COLUMNS+1)]    = index_in[r*INDEX +: INDEX];
            for (c = 0; c < COLUMNS; c = c + 1) begin : column
                localparam LEFT = r*(COLUMNS+1) + c;
                localparam ABOVE = r*COLUMNS + c;
                gpe #(.GROUP(GROUP), .WIDTH(WIDTH), .PSUM(PSUM)) element (
                    .clock(clock),
                    .reset(reset),
                    .load(load),
                    .activations_in(down[ABOVE]),
                    .activations(down[ABOVE + COLUMNS]),
                    .valid_in(valid[LEFT]),
                    .sign_in(sign[LEFT]),
                    .exponent_in(exponent[LEFT]),
                    .index_in(index[LEFT]),
                    .last_in(last[LEFT]),
                    .valid(valid[LEFT + 1]),
                    .sign(sign[LEFT + 1]),
                    .exponent(exponent[LEFT + 1]),
                    .index(index[LEFT + 1]),
                    .last(last[LEFT + 1]),
                    .psum_in(sums[ABOVE]),
                    .psum(sums[ABOVE + COLUMNS])
                );
            end
        end
    endgenerate
endmodule
