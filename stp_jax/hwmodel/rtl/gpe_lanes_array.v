// Input-stationary systolic array of ROWS x COLUMNS elements of LANES terms a cycle (gpe_lanes.v).
//
// The schedule is that of gpe_array.v with passes for slots: a filter of k slots takes
// n = ceil(k / LANES) passes, one a cycle, so a fold takes 2R + C - 2 cycles and the passes of its
// filters. Three things differ.
//
// * A partial sum runs down the rows in every pass, so no element waits or accumulates: those of a
//   filter's passes are added below the bottom row, in the cycle in which they leave.
// * Activations come down a column's bus and row r takes its own in the cycle of load[r]; loading
//   R rows takes R cycles as before, but each element is clocked once.
// * Indices become one-hot selects at the edge, once for all columns.
module gpe_lanes_array #(
    parameter ROWS = 4,
    parameter COLUMNS = 4,
    parameter GROUP = 8,
    parameter LANES = 4,
    parameter WIDTH = 8,
    parameter PSUM = 32,
    parameter INDEX = $clog2(GROUP),
    parameter EXPONENT = $clog2(WIDTH)
) (
    input                                   clock,
    input                                   reset,
    input  [ROWS-1:0]                       load,
    input  [COLUMNS*GROUP*WIDTH-1:0]        activations_in,  // unsigned
    input  [ROWS*LANES-1:0]                 valid_in,  // row r's pass at column 0, skewed by the edge
    input  [ROWS*LANES-1:0]                 sign_in,
    input  [ROWS*LANES*EXPONENT-1:0]        exponent_in,
    input  [ROWS*LANES*INDEX-1:0]           index_in,
    input  [ROWS-1:0]                       active_in,  // there is a pass
    input  [ROWS-1:0]                       last_in,    // and it is its filter's last
    input  [COLUMNS*PSUM-1:0]               psum_in,
    output [COLUMNS-1:0]                    psum_take,  // row 0 adds psum_in in this cycle
    output [COLUMNS-1:0]                    psum_done,  // a filter's sum is in psum after this cycle
    output [COLUMNS*PSUM-1:0]               psum
);
    localparam RESIDENT = GROUP * WIDTH;
    localparam BOTTOM = ROWS - 1;

    wire [PSUM-1:0]           sums     [0:(ROWS+1)*COLUMNS-1];
    wire [LANES*GROUP-1:0]    select   [0:ROWS*(COLUMNS+1)-1];
    wire [LANES-1:0]          negative [0:ROWS*(COLUMNS+1)-1];
    wire [LANES*EXPONENT-1:0] exponent [0:ROWS*(COLUMNS+1)-1];

    // What runs beside the terms of the top and of the bottom row, from column to column.
    reg [COLUMNS-1:0] active_top, last_top, active_bottom, last_bottom;
    wire [COLUMNS:0] active_at_top = {active_top, active_in[0]};
    wire [COLUMNS:0] last_at_top = {last_top, last_in[0]};
    wire [COLUMNS:0] active_at_bottom = {active_bottom, active_in[BOTTOM]};
    wire [COLUMNS:0] last_at_bottom = {last_bottom, last_in[BOTTOM]};
    always @(posedge clock) begin
        active_top    <= reset ? {COLUMNS{1'b0}} : active_at_top[COLUMNS-1:0];
        last_top      <= reset ? {COLUMNS{1'b0}} : last_at_top[COLUMNS-1:0];
        active_bottom <= reset ? {COLUMNS{1'b0}} : active_at_bottom[COLUMNS-1:0];
        last_bottom   <= reset ? {COLUMNS{1'b0}} : last_at_bottom[COLUMNS-1:0];
    end

    genvar r, c, l;
    generate
        for (c = 0; c < COLUMNS; c = c + 1) begin : column_edge
            // Only a filter's first pass carries the partial sum of earlier folds, or the bias.
            reg begun;
            assign psum_take[c] = active_at_top[c] & ~begun;
            assign sums[c] = begun ? {PSUM{1'b0}} : psum_in[c*PSUM +: PSUM];
            // Passes meet: a sum of the bottom row is in its register a cycle after its flags.
            reg active, last;
            reg [PSUM-1:0] gathered;
            assign psum[c*PSUM +: PSUM] = sums[ROWS*COLUMNS + c] + gathered;
            assign psum_done[c] = last_at_bottom[c];
            always @(posedge clock) begin
                if (reset) begun <= 1'b0;
                else if (active_at_top[c]) begun <= ~last_at_top[c];
                active <= active_at_bottom[c] & ~reset;
                last   <= last_at_bottom[c] & ~reset;
                if (reset | last) gathered <= {PSUM{1'b0}};
                else if (active) gathered <= psum[c*PSUM +: PSUM];
            end
        end
        for (r = 0; r < ROWS; r = r + 1) begin : row
            for (l = r*LANES; l < (r+1)*LANES; l = l + 1) begin : edge_lane
                assign select[r*(COLUMNS+1)][(l - r*LANES)*GROUP +: GROUP] =
                    {{(GROUP-1){1'b0}}, valid_in[l]} << index_in[l*INDEX +: INDEX];
                assign negative[r*(COLUMNS+1)][l - r*LANES] = sign_in[l] & valid_in[l];
                assign exponent[r*(COLUMNS+1)][(l - r*LANES)*EXPONENT +: EXPONENT] =
                    exponent_in[l*EXPONENT +: EXPONENT];
            end
            for (c = 0; c < COLUMNS; c = c + 1) begin : column
                localparam LEFT = r*(COLUMNS+1) + c;
                localparam ABOVE = r*COLUMNS + c;
                gpe_lanes #(
                    .GROUP(GROUP), .LANES(LANES), .WIDTH(WIDTH), .PSUM(PSUM)
                ) element (
                    .clock(clock),
                    .load(load[r]),
                    .activations_in(activations_in[c*RESIDENT +: RESIDENT]),
                    .select_in(select[LEFT]),
                    .negative_in(negative[LEFT]),
                    .exponent_in(exponent[LEFT]),
                    .select(select[LEFT + 1]),
                    .negative(negative[LEFT + 1]),
                    .exponent(exponent[LEFT + 1]),
                    .psum_in(sums[ABOVE]),
                    .psum(sums[ABOVE + COLUMNS])
                );
            end
        end
    endgenerate
endmodule
