// Feed-forward group PE: LANES terms of each of GROUPS groups a cycle, for COLUMNS columns.
//
// Every lane selects one of its group's resident activations (one-hot, AND-OR), shifts it by the
// term's exponent and complements it if the term is subtracted. A carry-save tree adds all lanes
// and the partial sum from above, with one carry-propagating addition for all of them. A group of
// more terms than lanes takes several passes, each with a partial sum of its own; the passes' sums
// meet below the array. So nothing is accumulated here, no register but the partial sum's moves
// with the terms' values, and the registers of the terms serve all columns.
module term_lane #(
    parameter GROUP = 8,
    parameter WIDTH = 8,
    parameter EXPONENT = $clog2(WIDTH),
    parameter OUT = 2 * WIDTH - 1
) (
    input  [GROUP*WIDTH-1:0] activations,
    input  [GROUP-1:0]       select,    // one-hot; all zero: an empty slot
    input                    negative,  // zero in an empty slot
    input  [EXPONENT-1:0]    exponent,
    output [OUT-1:0]         value      // of the term, less one if negative
);
    integer i;
    reg [WIDTH-1:0] selected;
    always @* begin
        selected = {WIDTH{1'b0}};
        for (i = 0; i < GROUP; i = i + 1)
            selected = selected | (activations[i*WIDTH +: WIDTH] & {WIDTH{select[i]}});
    end
    // Complement first: what is shifted in below must then be ones, and fewer bits toggle.
    wire        [WIDTH-1:0]        signed_one = selected ^ {WIDTH{negative}};
    wire signed [WIDTH+OUT-1:0]    extended = {{(OUT){signed_one[WIDTH-1]}}, signed_one};
    wire        [OUT+WIDTH-2:0]    filled = {{(OUT-WIDTH){signed_one[WIDTH-1]}}, signed_one,
                                             {(WIDTH-1){negative}}};
    wire        [OUT+WIDTH-2:0]    shifted = filled << exponent;
    assign value = shifted[OUT+WIDTH-2:WIDTH-1];
endmodule

module term_dot #(
    parameter GROUP = 8,
    parameter GROUPS = 1,
    parameter LANES = 4,
    parameter COLUMNS = 1,
    parameter WIDTH = 8,
    parameter PSUM = 28,
    parameter INDEXED = 0,   // 0: selects arrive one-hot; 1: valid and index, decoded here
    parameter EXPONENT = $clog2(WIDTH),
    parameter INDEX = $clog2(GROUP),
    parameter TERM = 1 + EXPONENT + (INDEXED ? 1 + INDEX : GROUP)
) (
    input                                          clock,
    input                                          load,
    input      [COLUMNS*GROUPS*GROUP*WIDTH-1:0]    activations_in,
    output reg [COLUMNS*GROUPS*GROUP*WIDTH-1:0]    activations,
    input      [GROUPS*LANES*TERM-1:0]             terms_in,  // {select or valid and index, sign, exponent}
    output reg [GROUPS*LANES*TERM-1:0]             terms,
    input      [COLUMNS*PSUM-1:0]                  psum_in,
    output reg [COLUMNS*PSUM-1:0]                  psum
);
    localparam ALL = GROUPS * LANES;
    localparam OUT = 2 * WIDTH - 1;
    // Each lane's sign bit is inverted, which adds 2^(OUT-1); this takes it away again.
    localparam [PSUM-1:0] OFFSET = -(ALL << (OUT - 1));

    wire [ALL*GROUP-1:0] selects;
    wire [ALL-1:0]       negative;
    genvar c, l;
    generate
        for (l = 0; l < ALL; l = l + 1) begin : decode
            wire [TERM-1:0] term = terms_in[l*TERM +: TERM];
            assign negative[l] = term[EXPONENT];
            if (INDEXED) begin : indexed
                assign selects[l*GROUP +: GROUP] = term[TERM-1] << term[EXPONENT+1 +: INDEX];
            end else begin : one_hot
                assign selects[l*GROUP +: GROUP] = term[EXPONENT+1 +: GROUP];
            end
        end
        for (c = 0; c < COLUMNS; c = c + 1) begin : column
            wire [(ALL+2)*PSUM-1:0] words;
            wire [PSUM-1:0] sum, carry;
            for (l = 0; l < ALL; l = l + 1) begin : lane
                wire [OUT-1:0] value;
                term_lane #(.GROUP(GROUP), .WIDTH(WIDTH)) one (
                    .activations(activations[(c*GROUPS + l/LANES)*GROUP*WIDTH +: GROUP*WIDTH]),
                    .select(selects[l*GROUP +: GROUP]),
                    .negative(negative[l]),
                    .exponent(terms_in[l*TERM +: EXPONENT]),
                    .value(value)
                );
                assign words[l*PSUM +: PSUM] =
                    {{(PSUM-OUT){1'b0}}, ~value[OUT-1], value[OUT-2:0]};
            end
            assign words[ALL*PSUM +: PSUM] = OFFSET;
            assign words[(ALL+1)*PSUM +: PSUM] = psum_in[c*PSUM +: PSUM];
            carry_save_tree #(.WORDS(ALL+2), .WIDTH(PSUM)) tree (
                .words(words), .low(negative), .sum(sum), .carry(carry)
            );
            always @(posedge clock) psum[c*PSUM +: PSUM] <= sum + carry;
        end
    endgenerate

    always @(posedge clock) begin
        if (load) activations <= activations_in;
        terms <= terms_in;
    end
endmodule
