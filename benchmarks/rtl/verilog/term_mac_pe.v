// Term revealing's tMAC (Kung, McDanel and Zhang, SC20): pairs of a weight term and an activation
// term, one a cycle. Exponents are added, and the coefficient of that power of two counts up or
// down; at a group's end the coefficients become a number. Each activation holds at most DATA terms,
// resident as such: a group of at most k weight terms takes k * DATA cycles.
module term_mac_pe #(
    parameter GROUP = 8,
    parameter DATA = 3,
    parameter COUNT = 7,      // bits of a coefficient: k * DATA up to 63
    parameter PSUM = 28,
    parameter TERM = 5        // {valid, sign, exponent}
) (
    input                              clock,
    input                              reset,
    input                              load,
    input      [GROUP*DATA*TERM-1:0]   activations_in,  // the column's bus
    input      [9:0]                   step_in,  // {data term, weight term {valid, sign, exponent}, index}
    input                              last_in,
    output reg [9:0]                   step,
    output reg                         last,
    input      [PSUM-1:0]              psum_in,
    output reg [PSUM-1:0]              psum
);
    localparam POWERS = 15;

    reg [GROUP*DATA*TERM-1:0] activations;
    reg [POWERS*COUNT-1:0] counts, held, next;
    reg take;

    wire [4:0] place = step_in[2:0] * DATA + step_in[9:8];
    wire [TERM-1:0] data = activations[place*TERM +: TERM];
    wire       valid = data[4] & step_in[7];
    wire       negative = data[3] ^ step_in[6];
    wire [3:0] exponent = {1'b0, data[2:0]} + {1'b0, step_in[5:3]};
    wire [POWERS-1:0] hit = {{(POWERS-1){1'b0}}, valid} << exponent;
    integer e;
    always @* begin
        next = counts;
        for (e = 0; e < POWERS; e = e + 1)
            if (hit[e])
                next[e*COUNT +: COUNT] = counts[e*COUNT +: COUNT]
                                         + {{(COUNT-1){negative}}, 1'b1};
    end

    // Coefficients with their sign bit inverted are unsigned; OFFSET takes off what that adds.
    localparam [PSUM-1:0] OFFSET = -(((1 << POWERS) - 1) << (COUNT - 1));
    wire [(POWERS+2)*PSUM-1:0] words;
    wire [PSUM-1:0] sum, carry, total;
    genvar p;
    generate
        for (p = 0; p < POWERS; p = p + 1) begin : power
            wire [COUNT-1:0] count = held[p*COUNT +: COUNT] ^ (1 << (COUNT - 1));
            assign words[p*PSUM +: PSUM] = {{(PSUM-COUNT){1'b0}}, count} << p;
        end
    endgenerate
    assign words[POWERS*PSUM +: PSUM] = psum_in;
    assign words[(POWERS+1)*PSUM +: PSUM] = OFFSET;
    carry_save_tree #(.WORDS(POWERS + 2), .WIDTH(PSUM)) tree (
        .words(words), .low({POWERS{1'b0}}), .sum(sum), .carry(carry)
    );
    ripple_adder #(.WIDTH(PSUM)) adder (.a(sum), .b(carry), .sum(total));

    always @(posedge clock) begin
        if (load) activations <= activations_in;
        counts <= reset | last_in ? {POWERS*COUNT{1'b0}} : next;
        if (last_in) held <= next;
        take <= last_in & ~reset;
        if (take) psum <= total;
        step <= step_in;
        last <= last_in & ~reset;
    end
endmodule
